"""Operators with a packed form besides matmuls: views, copies, rows, experts.

select, unbind          one expert of a stack; a view
slice, split, cat       rows of the matrix: codes and scales are cut or joined, not quantized again
W[ids]                  of a stack: a view with an index; a matmul with it reads only those experts
                        of a matrix: the dequantized rows
embedding, index_select the same, but no id counts from the end
copy_                   new values are quantized in the same format, see `parameter_writes`
"""

import logging
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fqcompile.kernels.registry import LAYOUTS, in_kernel_layout, in_plain_layout
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.torch_compat import DispatchKey, cond_op
from fqcompile.weights.dense_view import DenseView, refusal
from fqcompile.weights.memory import Memory, MemoryPart, Place, some_rows, whole_place
from fqcompile.weights.parameter import PackedWeight
from fqcompile.weights.parameter_matmuls import implements, same
from fqcompile.weights.parameter_writes import write

log = logging.getLogger("fqcompile")
_read_as_tables: set[str] = set()  # parameters for which the warning was logged
_SAME = {"dtype", "device", "layout", "pin_memory", "non_blocking", "memory_format"}


# In eager calls the predicate has a value: run torch.cond as for dense tensors.
cond_op.py_impl(PackedWeight)(cond_op.py_kernels[DispatchKey.CompositeExplicitAutograd])


@implements("aten.view.default", "aten.expand.default", view=True)
def _viewed(w: PackedWeight, size: Any, **_: Any) -> Any:
    return same(w) if tuple(size) == tuple(w.shape) else NotImplemented


@implements("aten._unsafe_view.default")
def _unsafe_view(w: PackedWeight, size: Any) -> Any:
    return same(w) if tuple(size) == tuple(w.shape) else NotImplemented


@implements("aten.select.int", view=True)
def _select(w: PackedWeight, dim: int, index: int) -> Any:
    outside = not -w.shape[dim] <= index < w.shape[dim]
    if dim % w.dim() or outside or not w.format.experts or w.ids is not None:
        return NotImplemented
    return _expert(w, index)


@implements("aten.unbind.int", view=True)
def _unbind(w: PackedWeight, dim: int = 0) -> Any:
    if dim % w.dim() or not w.format.experts or w.ids is not None:
        return NotImplemented
    return [_expert(w, index) for index in range(w.format.experts)]


def _expert(w: PackedWeight, index: int) -> PackedWeight:
    size, stride, offset = w.place
    place = Place(size[1:], stride[1:], offset + index % size[0] * stride[0])
    part = MemoryPart(w.memory, lambda stack: stack.expert(index))
    return PackedWeight.showing(part, w.dtype, place, flipped=w.flipped)


@implements("aten.slice.Tensor")
def _slice(
    w: PackedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    size = w.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    if (first, last, step) == (0, size, 1):
        return same(w)
    if dim % w.dim() != _row_dim(w) or step != 1 or w.format.experts or last <= first:
        return NotImplemented
    return _rows(w, first, last - first)


@implements("aten.split.Tensor", "aten.split_with_sizes.default")
def _split(w: PackedWeight, sizes: Any, dim: int = 0) -> Any:
    if dim % w.dim() != _row_dim(w) or w.format.experts or sizes == 0:
        return NotImplemented
    size = w.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    if sum(sizes) != size or min(sizes) < 1:
        return NotImplemented
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_rows(w, start, rows) for start, rows in zip(starts, sizes, strict=True)]


@implements("aten.cat.default")
def _cat(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(w, PackedWeight) and not w.format.experts for w in tensors):
        return NotImplemented
    formats = [w.format for w in tensors]
    kinds = {(f.qtype, f.k, f.transposed, w.dtype) for f, w in zip(formats, tensors, strict=True)}
    finest = min(f.group_size for f in formats)
    fits = all(f.group_size % finest == 0 or f.group_size >= f.k for f in formats)
    if len(kinds) > 1 or not fits or dim % first.dim() != _row_dim(first):
        return NotImplemented
    whole = QuantizedTensor.cat([w.quantized().regroup(finest) for w in tensors])
    return PackedWeight.of(whole, first.dtype)


def _row_dim(w: PackedWeight) -> int:
    return w.dim() - 1 if w.format.transposed else w.dim() - 2


def _rows(w: PackedWeight, start: int, rows: int) -> PackedWeight:
    dtype, dim = w.dtype, _row_dim(w)

    def take(whole: QuantizedTensor) -> QuantizedTensor:
        part = LAYOUTS[whole.format.layout].narrow(whole, start, rows)
        if part is not None:
            return part
        return in_kernel_layout(in_plain_layout(whole).narrow(start, rows), dtype)

    size, stride, offset = w.place
    place = Place([*size[:dim], rows, *size[dim + 1 :]], stride, offset + start * stride[dim])
    return PackedWeight.showing(MemoryPart(w.memory, take), dtype, place, flipped=w.flipped)


@implements("aten.index.Tensor")
def _index(w: PackedWeight, indices: Any) -> Any:
    ids = indices[0] if isinstance(w, PackedWeight) and len(indices) == 1 else None
    if not _are_ids(ids):
        return NotImplemented
    if w.format.experts:
        return _picked(w, ids)
    count = w.shape[0]
    return _table_rows(w, torch.where((ids < 0) & (ids >= -count), ids + count, ids))


@implements("aten.index_select.default")
def _index_select(w: PackedWeight, dim: int, index: Tensor) -> Any:
    if dim % w.dim() or not _are_ids(index) or index.dim() > 1:
        return NotImplemented
    index = index.reshape(-1)
    if not w.format.experts:
        return _table_rows(w, index)
    # The matmul that reads the experts counts negative ids from the end, but below none is.
    return _picked(w, torch.where(index < 0, index - w.format.experts, index))


@implements("aten.embedding.default")
def _embedding(w: PackedWeight, ids: Tensor, *_: Any) -> Any:
    plain = isinstance(w, PackedWeight) and w.dim() == 2 and _are_ids(ids)
    return _table_rows(w, ids) if plain else NotImplemented


def _are_ids(index: object) -> TypeGuard[Tensor]:
    return isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)


def _table_rows(w: PackedWeight, ids: Tensor) -> Any:
    _warn_of_coarse_rows(w)
    return NotImplemented if w.format.transposed else some_rows(w.packed, ids, w.dtype)


def _picked(w: PackedWeight, ids: Tensor) -> Any:
    if ids.dim() != 1 or w.ids is not None:
        return NotImplemented
    place = whole_place((ids.shape[0], *w.shape[1:]))
    return PackedWeight.showing(w.memory, w.dtype, place, flipped=w.flipped, ids=ids)


def _warn_of_coarse_rows(w: PackedWeight) -> None:
    """Warn once: `quantize_` could not see that this linear's weight is also read as a table."""
    name = w.memory.name
    if w.format.bits > 4 or not name or name in _read_as_tables:
        return
    _read_as_tables.add(name)
    log.warning(
        "%s is packed to %d bits for its matmul, and is read as a table too: its rows are the "
        "dequantized ones. Keep it dense by quantize_(model, exclude=[%r]), or give it 8 bits by "
        "overrides={%r: {'bits': 8}}",
        *(name, w.format.bits, name, name),
    )


@implements("aten.clone.default")
def _clone(w: PackedWeight, **_: Any) -> PackedWeight:
    packed = w.packed.clone()
    if w.ids is None:
        return PackedWeight.whole(packed, w.dtype, w.memory.name)
    memory, place = Memory(packed, w.memory.name), whole_place(w.shape)
    return PackedWeight.showing(memory, w.dtype, place, ids=w.ids.clone())


@implements("aten._to_copy.default")
def _to_copy(w: PackedWeight, **changes: Any) -> Any:
    """Another dtype keeps the codes, and x must match it; a device may need another layout."""
    dtype = changes.get("dtype") or w.dtype
    device = torch.device(changes.get("device") or w.device)
    if not dtype.is_floating_point or changes.keys() - _SAME or w.ids is not None:
        return NotImplemented
    if device.type in (w.device.type, "meta"):
        moved = w.qweight.to(device, copy=True), w.scale.to(device, copy=True)
        return PackedWeight.whole(QuantizedTensor(*moved, w.format), dtype, w.memory.name)
    return PackedWeight.of(w.quantized().to(device), dtype, w.memory.name)


@implements("aten.copy_.default")
def _copy(w: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(w, PackedWeight | DenseView):
        return NotImplemented
    write(w, source)
    return w


@implements("aten.set_.source_Tensor")
def _set(target: Tensor, source: Tensor) -> Any:
    """Refuse: writes to the target would not reach a packed source."""
    packed = next(w for w in (target, source) if isinstance(w, PackedWeight | DenseView))
    raise refusal("aten.set_.source_Tensor", packed)
