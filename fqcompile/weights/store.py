"""The table of packed weights, keyed by the identity of the dense weight, with weak references.

Parameters are graph inputs without identity guards, so one compiled graph serves many instances;
no state of a weight may be stored in the graph. An entry is deleted with its weight, and is
invalidated when the weight's storage or version changes, or its content if that is compared.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.locks import fork_safe
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.choose import QuantPlan, choose_and_quantize
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.disk_cache import find_or_quantize
from fqcompile.weights.fingerprint import ATTEMPTS, Memory, Values, fingerprint, values_of
from fqcompile.weights.memory import Lifetime, lifetime
from fqcompile.weights.node_weight import (
    NodeWeight,
    Part,
    Tensors,
    any_packed,
    packed_already,
    part_key,
    plan_of_packed,
    share_memory,
)
from fqcompile.weights.recipe import WeightRecipe

Numbers = tuple[int, ...]


@contextmanager
def plain_eager(device_type: str) -> Iterator[None]:
    """Quantize as if called from the top level, whatever modes the caller runs under.

    Tensors made in inference mode could not be saved for a backward pass later; autocast would
    change the arithmetic.
    """
    casts = torch.amp.is_autocast_available(device_type)  # not on the meta device
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device_type, enabled=False) if casts else nullcontext(),
    ):
        yield


class _Known(NamedTuple):
    """The values that a weight was found to have, and their number: no others ever get it."""

    values: Values
    number: int
    memory: Memory


@dataclass(frozen=True)
class _Entry:
    """`numbers` are those of the values that the sources had."""

    numbers: Numbers
    sources: tuple[weakref.ref[Lifetime], ...]
    result: Any

    def is_of(self, sources: Tensors) -> bool:
        """The very same tensors. A dead tensor's id may be used again."""
        lives = map(lifetime, sources)
        return all(ref() is life for ref, life in zip(self.sources, lives, strict=True))


def _key(weight: Tensor, callback: Callable[[object], None] | None = None) -> WeakIdRef:
    return WeakIdRef(lifetime(weight), callback)


@dataclass(frozen=True)
class _InPacked:
    """A part that is held in a kernel's layout alone, from which it can be recovered."""

    spec: NodeWeight
    index: int
    packed: QuantizedTensor

    def recover(self) -> QuantizedTensor:
        return self.spec.recover(self.packed, self.index)


_Held = QuantizedTensor | _InPacked | None


class _Made(NamedTuple):
    """The result of a request, and other tensors to store for (weights, request)."""

    result: Any
    held: tuple[tuple[Tensors, object, object], ...] = ()


class WeightStore:
    """Weak-keyed results per weight: chosen plans, and packed tensors.

    Thread-safe. One thread computes at a time, so that nothing is computed twice. A thread that
    waits for `lock` may hold the lock of torch's compiler; one that holds `lock` must not take it.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=_key)
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=_key)
        self._numbers = count()
        self._lock = fork_safe(threading.RLock())

    def plan(
        self,
        recipe: WeightRecipe,
        sources: Tensors,
        options: SiteOptions,
        scale_dtype: torch.dtype,
        calibration: Calibration | None = None,
    ) -> QuantPlan | str:
        """The plan for this matrix, or the reason why it cannot be quantized.

        Computing a plan's error requires quantizing; the result is stored for `quantized`. What is
        planned stays so while the weight has these values.
        """

        asked = None if calibration is None else calibration.asked
        request = ("plan", recipe.key, options, scale_dtype, asked)
        h = None if calibration is None else calibration.h

        def choose(weights: Tensors) -> _Made:
            w = recipe(*weights)
            if any_packed(weights):
                return _Made(plan_of_packed(w))
            try:
                if (request, tuple(map(id, sources))) in self._entries.get(sources[0], {}):
                    # A weight that changes while it is in use is being trained: no other start
                    # will meet it.
                    plan, weight = choose_and_quantize(w, options, scale_dtype, h)
                else:
                    values = None if recipe.steps else self._number(weights[0]).values
                    plan, weight = find_or_quantize(w, options, scale_dtype, h, values)
            except UnquantizableWeight as error:
                return _Made(str(error))
            plan = replace(plan, calibration=calibration)
            part = ("part", part_key(recipe, plan))
            known = self._find(weights, part, self._all(weights)) is not None
            return _Made(plan, () if known else ((weights, part, weight),))

        result: QuantPlan | str = self._get(sources, request, choose)
        with self._lock:
            any_values = dict.fromkeys(map(id, sources), 0)
            self._set(sources, ("calibration", recipe.key, asked), calibration, any_values)
        return result

    def calibration(self, recipe: WeightRecipe, sources: Tensors, asked: str) -> Calibration | None:
        """What the weight was planned with, if it was, for the same option.

        Whatever values it has had since: an optimizer's step or a merged adapter moves them little.
        """
        with self._lock:
            request = ("calibration", recipe.key, asked)
            found = self._find(sources, request, (0,) * len(sources))
            return None if found is None else found.result

    def quantized(self, part: Part, sources: Tensors) -> QuantizedTensor:
        """One site's codes and scales in the plain layout, computed on the first request.

        If only a kernel's layout holds them, they are recovered from it, bit for bit; if the layout
        cannot be undone, they are computed again.
        """
        if part.plan.calibration is not None:  # that of a graph's first instance; this has its own
            own = self.calibration(part.recipe, sources, part.plan.calibration.asked)
            part = replace(part, plan=replace(part.plan, calibration=own or part.plan.calibration))
        held: _Held = self._get(sources, ("part", part.key), lambda w: _Made(part.quantize(w)))
        if held is None:
            with plain_eager(sources[0].device.type):
                return part.quantize(sources)
        return held.recover() if isinstance(held, _InPacked) else held

    def packed(self, spec: NodeWeight, sources: Tensors) -> QuantizedTensor:
        """The weight of a node: its parts stacked, in the kernel's layout; one shared copy."""
        packed: QuantizedTensor = self._get(
            sources, ("packed", spec.key), partial(self._pack, spec)
        )
        return packed

    def _pack(self, spec: NodeWeight, sources: Tensors) -> _Made:
        own_memory = packed_already(spec, sources)
        if own_memory is not None:
            return _Made(own_memory)
        parts = list(spec.part_sources(sources))
        stacked = spec.stack([self.quantized(part, own) for part, own in parts])
        packed = spec.layout.pack(stacked)
        views = list(spec.slices(stacked)) if packed is stacked else [None] * len(parts)
        holds: list[tuple[Tensors, object, object]] = []
        for index, ((part, own), view) in enumerate(zip(parts, views, strict=True)):
            held: _Held = None
            # scales repeated for a finer group size would not serve a coarser request
            if view is not None and view.group_size == part.plan.group_size:
                held = view
            elif spec.layout.unpack_matrix is not None and not any_packed(own):
                held = _InPacked(spec, index, packed)
            holds.append((own, ("part", part.key), held))
        share_memory(spec, packed, sources)
        return _Made(packed, tuple(holds))

    def _get(self, sources: Tensors, request: object, make: Callable[[Tensors], _Made]) -> Any:
        """One entry per (weights, request): recomputed when the weights' values have changed.

        The values are numbered before the computation, and its result is stored only if they still
        have these numbers. If another thread changes them in every attempt, the result is computed
        from a copy and not stored.
        """
        with self._lock:
            for _ in range(ATTEMPTS):
                numbers = self._all(sources)
                found = self._find(sources, request, numbers)
                if found is not None:
                    return found.result
                with plain_eager(sources[0].device.type):
                    made = make(sources)
                if self._all(sources) == numbers:
                    number_of = dict(zip(map(id, sources), numbers, strict=True))
                    for entry in ((sources, request, made.result), *made.held):
                        self._set(*entry, number_of)
                    return made.result
            with plain_eager(sources[0].device.type):
                return make(tuple(source.detach().clone() for source in sources)).result

    def _find(self, sources: Tensors, request: object, numbers: Numbers) -> _Entry | None:
        entries: dict[Any, _Entry] = self._entries.get(sources[0], {})
        found = entries.get((request, tuple(map(id, sources))))
        current = found is not None and found.is_of(sources) and found.numbers == numbers
        return found if current else None

    def _set(
        self, sources: Tensors, request: object, result: object, number_of: dict[int, int]
    ) -> None:
        entries: dict[Any, _Entry] = self._entries.setdefault(sources[0], {})
        key = request, tuple(map(id, sources))
        # `entries` dies with the first source alone; the callback serves the others.
        lives = map(lifetime, sources)
        references = tuple(weakref.ref(life, lambda _: entries.pop(key, None)) for life in lives)
        entries[key] = _Entry(tuple(number_of[id(s)] for s in sources), references, result)

    def _all(self, sources: Tensors) -> Numbers:
        return tuple(self._number(source).number for source in sources)

    def _number(self, weight: Tensor) -> _Known:
        """The number of the values that the weight has: a new one when its fingerprint changes."""
        known: _Known | None = self._known.get(weight)
        is_known = known is not None and known.values.fingerprint == fingerprint((weight,))
        if known is None or not is_known or known.memory.gone():
            values, memory = values_of(weight), Memory((weight,))
            self._known[weight] = known = _Known(values, next(self._numbers), memory)
        return known

    def changed(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Invalidate and return stored weights whose content changed, however it was written.

        Reads every byte of them: used when a graph first sees its weights, not in every call.
        """
        with self._lock:
            known = [(tensor, self._known.get(tensor)) for tensor in tensors]
            found = [t for t, k in known if k is not None and k.values != values_of(t)]
            self.forget(found)
            return found

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Mark these tensors as changed, which invalidates their entries."""
        with self._lock:
            for tensor in tensors:
                self._known.pop(tensor, None)

    def tensors_of(self, sources: Tensors) -> list[Tensor]:
        """Every tensor that is stored for these weights, packed or plain; some share memory."""
        with self._lock:
            results = [e.result for w in sources for e in self._entries.get(w, {}).values()]
        return [t for r in results if isinstance(r, QuantizedTensor) for t in r.tensors]

    def clear(self) -> None:
        """Delete all entries; they are computed again on request."""
        with self._lock:
            self._entries.clear()


STORE = WeightStore()
