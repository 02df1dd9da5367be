"""Releasing the originals of packed weights, bringing them back, and who else needs them.

A weight may go when packed parts hold all of its elements and nothing known reads it densely: no
graph that was compiled, no second module, no other tensor in its memory.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from fqcompile.quant.chunks import plain_tensors
from fqcompile.weights.freed import FreedBy, empty_for, free, freed_by, is_freed, refill
from fqcompile.weights.packed import PackedPart
from fqcompile.weights.packed_weight import PackedWeight
from fqcompile.weights.store import STORE

# Weights that a compiled graph reads as they are, with its name; never forgotten while they live.
_dense_readers: WeakIdKeyDictionary = WeakIdKeyDictionary()
_restored: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note_dense_reader(weights: Iterable[Tensor], graph: str) -> None:
    """Remember that this compiled graph reads these weights as they are."""
    for weight in weights:
        _dense_readers.setdefault(weight, graph)


def module_counts() -> Mapping[int, int]:
    """How many modules of the process hold each parameter, by its id.

    Looks at every object there is: a tenth of a second, once for each set of weights.
    """
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    owned = (vars(module).get("_parameters", {}).values() for module in modules)
    return Counter(id(weight) for weights in owned for weight in weights)


def why_kept(weight: Tensor, parts: Sequence[PackedPart], modules: Mapping[int, int]) -> str | None:
    """Why a weight of which these parts are packed must keep its storage; None: it need not."""
    if isinstance(weight, PackedWeight):
        return "it is packed itself, and has no other values"
    if type(weight) is not nn.Parameter or weight.is_inference():
        return (
            "only parameters, made outside of inference mode, are freed; fqcompile.quantize_ packs "
            "those of a sharded model in place"
        )
    if weight in _restored:
        return "fqcompile.restore brought its values back"
    if weight in _dense_readers:
        return f"{_dense_readers[weight]} reads it as it is"
    if modules.get(id(weight), 0) > 1:
        return f"{modules[id(weight)]} modules share it"
    if not _cover(parts, weight):
        return "what is packed of it is computed, or is not all of it"
    return None


def release(weight: nn.Parameter, parts: Sequence[PackedPart], name: str, graph: str) -> str | None:
    """Free a weight that `why_kept` has nothing against; why that was in vain, or None.

    The parts are held from then on, whatever else is packed of them.
    """
    for part in parts:
        STORE.hold_alone(part, (weight,))
    memory = StorageWeakRef(weight.untyped_storage())
    form = (weight.storage_offset(), weight.size(), weight.stride())
    record = FreedBy(name, graph, partial(_dense, tuple(parts)), STORE.share, tuple(parts))
    with STORE.values_kept(weight):
        free(weight, record)
        if memory.expired():
            return None
        storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
        if storage is None:  # gone in between
            return None
        empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
        refill(weight, empty.set_(storage, *form))
    return "another tensor shares its memory"


def bring_back(weight: Tensor) -> None:
    """Give a freed weight its dequantised values; what is packed of it stays valid."""
    with STORE.values_kept(weight):
        refill(weight, freed_by(weight).dense(weight))


def packed_form(weight: Tensor) -> PackedWeight | None:
    """A freed weight as a packed one, where a single part is all of it, as it is or transposed."""
    if not is_freed(weight) or len(freed_by(weight).parts) != 1:
        return None
    (part,) = freed_by(weight).parts
    as_it_is = torch.empty_strided(weight.size(), weight.stride(), device="meta")
    view = part.recipe.view_of(as_it_is)
    forms = [(t.shape, t.stride()) for t in (as_it_is, as_it_is.mT)]
    if view is None or (view.shape, view.stride()) not in forms:
        return None
    return PackedWeight.of(
        STORE.quantized(part, (weight,)),
        dtype=weight.dtype,
        experts=part.experts,
        transposed=forms.index((view.shape, view.stride())) == 1,
        scale_method=part.plan.scale_method,
    )


def restore_weight(weight: Tensor) -> None:
    """The same for good: no graph frees it again."""
    bring_back(weight)
    _restored[weight] = True


def _cover(parts: Sequence[PackedPart], weight: Tensor) -> bool:
    """Whether every element is in some part, at a place where its dequantised value can go."""
    if any(part.recipe.num_sources != 1 for part in parts):
        return False
    if all(not part.recipe.steps for part in parts):
        return bool(parts)
    seen = torch.zeros_like(empty_for(weight), dtype=torch.bool)
    for part in parts:
        view = part.recipe.view_of(seen)
        if view is None:
            return False
        view.fill_(True)
    return bool(seen.all())


@plain_tensors()
def _dense(parts: Sequence[PackedPart], weight: Tensor) -> Tensor:
    """ŵ in the shape and dtype of the weight, from what is held of its parts."""
    dense = empty_for(weight)
    for part in parts:
        view = part.recipe.view_of(dense)
        assert view is not None
        values = STORE.quantized(part, (weight,)).dequantize(weight.dtype)
        view.copy_(values.view(view.shape))
    return dense
