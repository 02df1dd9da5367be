"""WeightDispatch: the callable that Dynamo keeps; it finds the packed tensors of its weights.

args ──► ids of the weights seen before? ──► unchanged? ──► inner(kept args, packed tensors)
                 │ no: is their content     │ no
                 │     what is held of it?  │
                 └──────── bind: decide, pack, (compile a variant) ◄──┘

A weight that changes in every call would be quantized in every call. If two calls in a row find the
weights of one input changed, or four calls in a row find all weights replaced, later calls use a
variant that reads the input dense. A call that finds them unchanged resets the count, so that an
occasional optimizer step or state dict only costs the packing. After a thousand calls the weights
are quantized again, in case they no longer change; if they do, the interval doubles.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from operator import itemgetter
from typing import Any

from torch import Tensor

from fqcompile.errors import PlanDoesNotFit
from fqcompile.torch_compat import SerializableCallable
from fqcompile.weights.fingerprint import ATTEMPTS, Fingerprint, Memory, fingerprint
from fqcompile.weights.memory import Lifetime, NoMemory, lifetime
from fqcompile.weights.store import STORE

Inner = Callable[..., Any]
Weights = tuple[Tensor, ...]
# A change counts two, but only one if all weights that the graph was bound to have died: perhaps
# models are created, called once and deleted.
_MOST_CHANGES = 4
_CALLS_AS_THEY_COME = 1000


@dataclass(frozen=True)
class Variant:
    """The graph compiled for one set of plans: the outer args it reads, and what fills the rest."""

    inner: Inner
    kept_args: tuple[int, ...]
    pack: Callable[[Sequence[Any]], tuple[Tensor, ...]]

    @cached_property
    def kept(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """The arguments that it reads."""
        return _at(self.kept_args)


def _at(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes these items out of a sequence, in C because every call does it."""
    if len(positions) < 2:  # for one position, itemgetter returns no tuple
        return lambda values: tuple([values[i] for i in positions])
    return itemgetter(*positions)


VariantFor = Callable[[Sequence[Any], frozenset[int]], Variant]


@dataclass(slots=True)
class _Binding:
    """The variant and packed tensors of weights in one state; `changes`: see `_MOST_CHANGES`."""

    variant: Variant
    packed: tuple[Tensor, ...]
    state: Fingerprint
    memory: Memory
    alive: tuple[weakref.ref[Lifetime], ...]
    changes: tuple[int, ...]
    calls: int = 0

    def counted(self, weights: Weights) -> tuple[int, ...]:
        """The consecutive changes of each input if `weights` replace those of this binding."""
        if self.calls > 1:
            return (0,) * len(weights)
        pairs = zip(*self.state, *fingerprint(weights), self.alive, weights, strict=True)
        new = [
            # a weight that is already packed is not quantized again
            not isinstance(w, NoMemory) and (v != v2 or p != p2 or ref() is not lifetime(w))
            for v, p, v2, p2, ref, w in pairs
        ]
        step = 2 if any(ref() is not None for ref in self.alive) else 1
        return tuple((n + step) * changed for n, changed in zip(self.changes, new, strict=True))


class _Table:
    """The bindings of the weights at `inputs`, by id; `lost`: the last one whose weights died."""

    def __init__(self, inputs: tuple[int, ...]) -> None:
        self.inputs, self.weights = inputs, _at(inputs)
        self.bindings: dict[tuple[int, ...], _Binding] = {}
        self.lost: _Binding | None = None

    def put(self, weights: Weights, binding: _Binding) -> None:
        self.bindings[tuple(map(id, weights))] = binding

    def watch(self, weights: Weights) -> tuple[weakref.ref[Lifetime], ...]:
        """References that forget the binding of these weights when one of them dies."""
        ids = tuple(map(id, weights))

        def forget(_: object) -> None:
            lost = self.bindings.pop(ids, None)
            if lost is not None:
                lost.packed = ()
                self.lost = lost

        return tuple(weakref.ref(lifetime(weight), forget) for weight in weights)


class WeightDispatch(SerializableCallable):
    """Runs the variant that fits the weights in `args`.

    The result of torch's `aot_compile` runs, but cannot be saved: it would have no weights.

    Args:
        weight_inputs: positions of the constant weights among the outer arguments.
        variant_for: decides the plans for these arguments and returns their variant; the inputs in
            its second argument are read dense.
        detect_updates: compare storage and version of every weight on each call, and repack on a
            change; otherwise only new identities are detected.
    """

    def __init__(
        self, weight_inputs: Sequence[int], variant_for: VariantFor, detect_updates: bool
    ) -> None:
        self._inputs = tuple(weight_inputs)
        self._variant_for = variant_for
        self._detect = detect_updates
        self._changing: frozenset[int] = frozenset()
        self._calls_left = self._wait = _CALLS_AS_THEY_COME
        self._table = _Table(self._inputs)
        _DISPATCHES[next(_numbers)] = self

    def __call__(self, *args: Any) -> Any:
        table = self._table
        weights = table.weights(args)
        binding = table.bindings.get(tuple(map(id, weights)))
        if binding is None:
            forget(STORE.changed(weights))
            binding = self.bind(args)
        # Bind again if the weights have changed in a way that PyTorch reports.
        elif self._detect and (binding.state != fingerprint(weights) or binding.memory.gone()):
            binding = self.bind(args)
        binding.calls += 1
        if self._changing:
            self._count_down()
        variant = binding.variant
        return variant.inner(*variant.kept(args), *binding.packed)

    # Tools that display compiled functions, such as depyf, read the name of the code object.
    __code__ = __call__.__code__

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """Refuse, before anything is written."""
        raise NotImplementedError(
            "a graph compiled by backend 'finequant' finds its packed weights in this process, so "
            "it cannot be saved; fqcompile.save(model, directory) keeps the packed weights"
        )

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        """Refuse: nothing of this class is ever written."""
        raise NotImplementedError("a graph compiled by backend 'finequant' cannot be saved")

    def bind(self, args: Sequence[Any], decided: Variant | None = None) -> _Binding:
        """Choose a variant for these weights and pack them; forget them when one of them dies.

        `decided` is the variant for their values if the caller knows it.
        """
        table, changing = self._table, self._changing
        weights = table.weights(args)
        old = table.bindings.get(tuple(map(id, weights)))
        last, table.lost = old or table.lost, None
        changes = last.counted(weights) if last else (0,) * len(weights)
        if max(changes, default=0) >= _MOST_CHANGES:
            pairs = zip(table.inputs, changes, strict=True)
            self._read_as_it_comes({i for i, n in pairs if n >= _MOST_CHANGES})
            return self.bind(args)
        forgotten, before, memory = _Forgotten.times, fingerprint(weights), Memory(weights)
        variant, packed = self._packed(args, changing, decided)
        new = _Binding(variant, packed, before, memory, table.watch(weights), changes)
        now = table.bindings.get(tuple(map(id, weights)))
        if now is not None and now is not old and now.state == before:
            return now  # another thread was faster; the change counts once
        table.put(weights, new)
        if forgotten != _Forgotten.times:  # a weight may have been packed before it was written to
            self.forget(set(map(id, weights)))
        return new

    def _packed(
        self, args: Sequence[Any], changing: frozenset[int], decided: Variant | None
    ) -> tuple[Variant, tuple[Tensor, ...]]:
        """The variant and its packed tensors, although another thread may write to the weights."""
        for _ in range(ATTEMPTS):
            with suppress(PlanDoesNotFit):  # planned for values that were overwritten
                variant = decided or self._variant_for(args, changing)
                decided = None
                return variant, variant.pack(args)
        copies = list(args)
        for i in self._inputs:
            copies[i] = args[i].detach().clone().requires_grad_(args[i].requires_grad)
        variant = self._variant_for(copies, changing)
        return variant, variant.pack(copies)

    def _read_as_it_comes(self, inputs: Iterable[int]) -> None:
        self._changing = self._changing.union(inputs)
        self._calls_left = self._wait
        self._table = _Table(tuple(i for i in self._inputs if i not in self._changing))

    def _count_down(self) -> None:
        self._calls_left -= 1
        if self._calls_left <= 0:
            self._wait *= 2
            self.start_again()

    def start_again(self) -> None:
        """Quantize again the weights that were read dense because they kept changing."""
        if self._changing:
            self._changing, self._table = frozenset(), _Table(self._inputs)

    def forget(self, ids: set[int]) -> None:
        """Forget the bindings of weights with these ids."""
        bindings = self._table.bindings
        for key in [key for key in list(bindings) if not ids.isdisjoint(key)]:
            bindings.pop(key, None)


# A dict with numbers as keys, not a set: its keys can be listed while other threads add to it.
_DISPATCHES: weakref.WeakValueDictionary[int, WeightDispatch] = weakref.WeakValueDictionary()
_numbers = count()


class _Forgotten:
    """How often `forget` was called, counted before it deletes bindings."""

    times = 0


def forget(weights: Sequence[Tensor]) -> None:
    """Make every graph bind these weights again."""
    _Forgotten.times += 1
    ids = set(map(id, weights))
    for dispatch in _all_dispatches() if ids else ():
        dispatch.forget(ids)


def start_again(weights: Sequence[Tensor]) -> None:
    """Make every graph bind these weights again, and quantize those that it read dense."""
    forget(weights)
    for dispatch in _all_dispatches():
        dispatch.start_again()


def _all_dispatches() -> Iterator[WeightDispatch]:
    found = (reference() for reference in _DISPATCHES.valuerefs())
    return (dispatch for dispatch in found if dispatch is not None)
