"""The one table of packed weights: found by the identity of the weight passed in, held weakly.

Parameters are graph inputs without identity guards, so one compiled graph serves many instances;
nothing about a weight may live in the graph. An entry dies with its weight, and is stale when the
weight's storage or version changes.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.kernels.template import PackedTensors
from fqcompile.locks import fork_safe
from fqcompile.quant.choose import QuantPlan, choose_and_quantize
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.find_or_quantize import find_or_quantize
from fqcompile.weights.no_memory import lifetime
from fqcompile.weights.packed import (
    PackedPart,
    PackedSpec,
    Tensors,
    packed_already,
    part_key,
    plan_of_packed,
    share_memory,
)
from fqcompile.weights.packed_weight import PackedWeight
from fqcompile.weights.recipe import WeightRecipe

T = TypeVar("T")
Fingerprint = tuple[tuple[int, ...], tuple[int, ...]]
_version: Callable[[Tensor], int] = attrgetter("_version")


def fingerprint(weights: Tensors) -> Fingerprint:
    """What changes when a weight is updated in place or given other storage: versions, addresses.

    Runs on every call of a compiled graph: 27 us for 224 weights.
    """
    try:
        return tuple(map(_version, weights)), tuple(map(Tensor.data_ptr, weights))
    except RuntimeError:
        return tuple(map(_version_or_0, weights)), tuple(map(_address_or_0, weights))


def _version_or_0(weight: Tensor) -> int:
    """Tensors made in inference mode keep no version."""
    return 0 if weight.is_inference() else weight._version


def _address_or_0(weight: Tensor) -> int:
    """Sparse tensors, which are never quantised, have no one address."""
    return weight.data_ptr() if weight.layout is torch.strided else 0


@contextmanager
def plain_eager(device_type: str) -> Iterator[None]:
    """Quantise as if called from the top level, whatever modes the caller runs under.

    Tensors made in inference mode could not be saved for a backward pass later; autocast would
    change the arithmetic.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device_type, enabled=False),
    ):
        yield


@dataclass(frozen=True)
class _Entry:
    """`values` number the values that the sources had, see `PackedStore._value`."""

    values: tuple[int, ...]
    sources: tuple[weakref.ref[object], ...]
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

    spec: PackedSpec
    index: int
    packed: PackedTensors

    def recover(self) -> QuantizedWeight:
        return self.spec.recover(self.packed, self.index)


_Held = QuantizedWeight | _InPacked | None


class PackedStore:
    """Weak-keyed results per weight: chosen plans, and packed tensors."""

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=_key)
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=_key)
        self._numbers = count()
        self._lock = fork_safe(threading.RLock())

    def plan(
        self,
        recipe: WeightRecipe,
        sources: Tensors,
        options: SiteOptions,
        scale_dtype: torch.dtype,
    ) -> QuantPlan | str:
        """The plan for this matrix, or the reason why it cannot be quantised.

        To know the error that a plan delivers is to quantise; the result is kept for `quantized`.
        """

        request = ("plan", recipe.key, options, scale_dtype)
        # A weight that changes while it is in use is being trained: no other start will meet it.
        changed = (request, tuple(map(id, sources))) in self._entries.get(sources[0], {})
        make = choose_and_quantize if changed else find_or_quantize

        def choose() -> QuantPlan | str:
            w = recipe(*sources)
            if _any_packed(sources):
                return plan_of_packed(w)
            try:
                plan, weight = make(w, options, scale_dtype)
            except UnquantizableWeight as error:
                return str(error)
            self._get(sources, ("part", part_key(recipe, plan)), lambda: weight)
            return plan

        return self._get(sources, request, choose)

    def quantized(self, part: PackedPart, sources: Tensors) -> QuantizedWeight:
        """One site's codes and scales in the plain layout, made on the first request.

        Where a kernel's layout holds them alone they are recovered from it, bit for bit; only where
        that cannot be undone are they computed again.
        """
        held = self.hold(part, sources)
        if held is None:
            with plain_eager(sources[0].device.type):
                return part.quantize(sources)
        return held.recover() if isinstance(held, _InPacked) else held

    def hold(self, part: PackedPart, sources: Tensors) -> _Held:
        """Quantise on the first request; what is held of it from then on. None: nothing."""
        return self._get(sources, ("part", part.key), partial(part.quantize, sources))

    def packed(self, spec: PackedSpec, sources: Tensors) -> PackedTensors:
        """What a node reads: the parts stacked, in its kernel's layout; one copy for all."""
        return self._get(sources, ("packed", spec.key), partial(self._pack, spec, sources))

    def _pack(self, spec: PackedSpec, sources: Tensors) -> PackedTensors:
        own_memory = packed_already(spec, sources)
        if own_memory is not None:
            return own_memory
        parts = list(spec.part_sources(sources))
        stacked = spec.stack([self.quantized(part, own) for part, own in parts])
        packed = spec.pack(stacked)
        plain = packed[0].data_ptr() == stacked.qweight.data_ptr()
        views = list(spec.slices(stacked)) if plain else [None] * len(parts)
        for index, ((part, own), view) in enumerate(zip(parts, views, strict=True)):
            held: _Held = None
            # scales repeated for a finer group size would not serve a coarser request
            if view is not None and view.group_size == part.plan.group_size:
                held = view
            elif spec.layout.unpack is not None and not _any_packed(own):
                held = _InPacked(spec, index, packed)
            self._set(own, ("part", part.key), held)
        share_memory(spec, packed, sources)
        return packed

    def _get(self, sources: Tensors, request: object, make: Callable[[], T]) -> T:
        """One entry per (weights, request): remade when the weights' fingerprint has changed."""
        with self._lock:
            entries: dict[Any, _Entry] = self._entries.setdefault(sources[0], {})
            found = entries.get((request, tuple(map(id, sources))))
            if found is not None and found.is_of(sources) and found.values == self._all(sources):
                result: T = found.result
                return result
            with plain_eager(sources[0].device.type):
                result = make()
            self._set(sources, request, result)
            return result

    def _set(self, sources: Tensors, request: object, result: object) -> None:
        entries: dict[Any, _Entry] = self._entries.setdefault(sources[0], {})
        key = request, tuple(map(id, sources))
        # `entries` dies with the first source alone; the callback serves the others.
        lives = map(lifetime, sources)
        references = tuple(weakref.ref(life, lambda _: entries.pop(key, None)) for life in lives)
        entries[key] = _Entry(self._all(sources), references, result)

    def _all(self, sources: Tensors) -> tuple[int, ...]:
        return tuple(map(self._value, sources))

    def _value(self, weight: Tensor) -> int:
        """The number of the values that the weight has: a new one when its fingerprint changes."""
        now = fingerprint((weight,))
        known = self._values.get(weight)
        if known is None or known[0] != now:
            self._values[weight] = known = (now, next(self._numbers))
        number: int = known[1]
        return number

    def tensors_of(self, sources: Tensors) -> list[Tensor]:
        """Every tensor that is held for these weights, packed or plain; some share memory."""
        with self._lock:
            results = [e.result for w in sources for e in self._entries.get(w, {}).values()]
        plain = [r for r in results if isinstance(r, QuantizedWeight)]
        packed = [t for r in results if isinstance(r, tuple) for t in r]
        return [*packed, *(t for weight in plain for t in (weight.qweight, weight.scale))]

    def clear(self) -> None:
        """Forget everything; it is made again where it is asked for."""
        with self._lock:
            self._entries.clear()


def _any_packed(sources: Tensors) -> bool:
    """Whether some have codes of their own, which nothing else need hold."""
    return any(isinstance(source, PackedWeight) for source in sources)


STORE = PackedStore()
