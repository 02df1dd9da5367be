"""The one table of packed weights: found by the identity of the weight passed in, held weakly.

Parameters are graph inputs without identity guards, so one compiled graph serves many instances;
nothing about a weight may live in the graph. An entry dies with its weight, and is stale when the
weight's storage, version or the request changes.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.kernels.template import PackedTensors
from fqcompile.quant.choose import QuantPlan, choose_and_quantize
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.find_or_quantize import find_or_quantize
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
    state: Fingerprint
    sources: tuple[weakref.ref[Tensor], ...]
    result: Any

    def is_of(self, sources: Tensors) -> bool:
        """Same tensors, unchanged. A dead tensor's id may be used again."""
        same = all(ref() is source for ref, source in zip(self.sources, sources, strict=True))
        return same and self.state == fingerprint(sources)


class PackedStore:
    """Weak-keyed results per weight: chosen plans, and packed tensors."""

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.RLock()

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
            if any(isinstance(source, PackedWeight) for source in sources):
                return plan_of_packed(w)
            try:
                plan, weight = make(w, options, scale_dtype)
            except UnquantizableWeight as error:
                return str(error)
            self._get(sources, ("part", part_key(recipe, plan)), lambda: weight)
            return plan

        return self._get(sources, request, choose)

    def quantized(self, part: PackedPart, sources: Tensors) -> QuantizedWeight | None:
        """One site's codes and scales in the plain layout, made on the first request.

        None where a kernel's own layout already holds them and the plain copy was dropped.
        """
        make = partial(part.quantize, sources)
        return self._get(sources, ("part", part.key), make)

    def packed(self, spec: PackedSpec, sources: Tensors) -> PackedTensors:
        """What a node reads: the parts stacked, in its kernel's layout; one copy for all."""
        return self._get(sources, ("packed", spec.key), partial(self._pack, spec, sources))

    def _pack(self, spec: PackedSpec, sources: Tensors) -> PackedTensors:
        own_memory = packed_already(spec, sources)
        if own_memory is not None:
            return own_memory
        parts = list(spec.part_sources(sources))
        weights = [self.quantized(part, own) or part.quantize(own) for part, own in parts]
        stacked = spec.stack(weights)
        packed = spec.pack(stacked)
        plain = packed[0].data_ptr() == stacked.qweight.data_ptr()
        views = spec.slices(stacked) if plain else repeat(None)
        for (part, own), view in zip(parts, views, strict=False):
            # scales repeated for a finer group size would not serve a coarser request
            exact = view is not None and view.group_size == part.plan.group_size
            self._set(own, ("part", part.key), view if exact else None)
        share_memory(spec, packed, sources)
        return packed

    def _get(self, sources: Tensors, request: object, make: Callable[[], T]) -> T:
        """One entry per (weights, request): remade when the weights' fingerprint has changed."""
        with self._lock:
            entries: dict[Any, _Entry] = self._entries.setdefault(sources[0], {})
            found = entries.get((request, tuple(map(id, sources))))
            if found is not None and found.is_of(sources):
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
        references = tuple(weakref.ref(s, lambda _: entries.pop(key, None)) for s in sources)
        entries[key] = _Entry(fingerprint(sources), references, result)

    def tensors_of(self, sources: Tensors) -> list[Tensor]:
        """Every tensor that is held for these weights, packed or plain; some share memory."""
        with self._lock:
            results = [e.result for w in sources for e in self._entries.get(w, {}).values()]
        plain = [r for r in results if isinstance(r, QuantizedWeight)]
        packed = [t for r in results if isinstance(r, tuple) for t in r]
        return [*packed, *(t for weight in plain for t in (weight.qweight, weight.scale))]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


STORE = PackedStore()
