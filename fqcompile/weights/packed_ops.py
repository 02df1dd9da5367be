"""What PackedWeight answers itself: views, copies, rows, experts. The rest gets the dense weight.

t, transpose            the same memory, read the other way round
select, unbind          one expert of a stack; a view
slice, split, cat       rows of the matrix; plain codes and scales, never quantised again
W[ids]                  a stack with an index; what multiplies with it reads only those experts
copy_                   new values are quantised as the old ones were, in the same memory
"""

import logging
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from fqcompile.errors import FineQuantError
from fqcompile.quant.choose import QuantPlan, quantize_weight, scale_dtype_beside
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.packed_weight import HANDLERS, PackedWeight

log = logging.getLogger("fqcompile")
_said: set[str] = set()
_SAME = {"dtype", "device", "layout", "pin_memory", "non_blocking", "memory_format"}
Handler = Callable[..., Any]


def implements(*names: str) -> Callable[[Handler], Handler]:
    """Registers `handler(*args, **kwargs)`; where it returns NotImplemented, the dense way runs."""

    def register(handler: Handler) -> Handler:
        @wraps(handler)
        def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = handler(*args, **kwargs)
            return densely(func, args, kwargs) if result is NotImplemented else result

        HANDLERS.update(dict.fromkeys(names, answer))
        return handler

    return register


def views(*names: str) -> Callable[[Handler], Handler]:
    """As `implements`, for results that share their argument's memory, which autograd is told."""

    def register(handler: Handler) -> Handler:
        @wraps(handler)
        def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = handler(*args, **kwargs)
            if result is NotImplemented:
                return densely(func, args, kwargs)
            return return_and_correct_aliasing(func, args, kwargs, result)

        HANDLERS.update(dict.fromkeys(names, answer))
        return handler

    return register


def densely(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator on dequantised weights: right for every operator, and as slow as it sounds.

    Raises:
        FineQuantError: it would write to a packed weight.
    """
    for schema, value in zip(func._schema.arguments, args, strict=False):
        written = schema.alias_info is not None and schema.alias_info.is_write
        if written and isinstance(value, PackedWeight):
            raise FineQuantError(
                f"{func} would write to a packed weight {tuple(value.shape)}; only copy_ (as "
                "load_state_dict does) can: call fqcompile.restore(model) to change values in place"
            )
    if str(func) not in _said:
        _said.add(str(func))
        log.info("%s has no packed form: the weight is dequantised for each call of it", func)
    dense = tree_map_only(PackedWeight, PackedWeight.dequantized, (args, kwargs))
    return func(*dense[0], **dense[1])


HANDLERS[None] = densely


@views("aten.detach.default", "aten.alias.default", "aten.lift_fresh.default")
def _same(w: PackedWeight) -> PackedWeight:
    return w.with_form()


@views("aten.view.default", "aten._unsafe_view.default", "aten.expand.default")
def _viewed(w: PackedWeight, size: Any, **_: Any) -> Any:
    return w.with_form() if tuple(size) == tuple(w.shape) else NotImplemented


@views("aten.t.default")
def _t(w: PackedWeight) -> Any:
    return w.with_form(transposed=not w.form.transposed)


@views("aten.transpose.int")
def _transpose(w: PackedWeight, dim0: int, dim1: int) -> Any:
    dims = {dim0 % w.dim(), dim1 % w.dim()}
    return _t(w) if dims == {w.dim() - 2, w.dim() - 1} else NotImplemented


@views("aten.permute.default")
def _permute(w: PackedWeight, dims: Any) -> Any:
    order, last = [d % w.dim() for d in dims], list(range(w.dim()))
    if order == last:
        return w.with_form()
    last[-2:] = last[-1], last[-2]
    return _t(w) if order == last else NotImplemented


@views("aten.select.int")
def _select(w: PackedWeight, dim: int, index: int) -> Any:
    if dim % w.dim() or not w.form.experts or w.ids is not None:
        return NotImplemented
    return _expert(w, index)


@views("aten.unbind.int")
def _unbind(w: PackedWeight, dim: int = 0) -> Any:
    if dim % w.dim() or not w.form.experts or w.ids is not None:
        return NotImplemented
    return [_expert(w, index) for index in range(w.form.experts)]


def _expert(w: PackedWeight, index: int) -> PackedWeight:
    form = w.with_form(experts=0).form
    return PackedWeight(w.qweight[index], w.scale[index], form, w.dtype)


@implements("aten.slice.Tensor")
def _slice(
    w: PackedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    size = w.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    if (first, last, step) == (0, size, 1):
        return w.with_form()
    if dim % w.dim() != _row_dim(w) or step != 1 or w.form.experts or last <= first:
        return NotImplemented
    return _rows(w, first, last - first)


@implements("aten.split.Tensor", "aten.split_with_sizes.default")
def _split(w: PackedWeight, sizes: Any, dim: int = 0) -> Any:
    if dim % w.dim() != _row_dim(w) or w.form.experts:
        return NotImplemented
    size = w.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_rows(w, start, rows) for start, rows in zip(starts, sizes, strict=True)]


@implements("aten.cat.default")
def _cat(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(w, PackedWeight) and not w.form.experts for w in tensors):
        return NotImplemented
    kinds = {(w.form.bits, w.form.k, w.form.transposed, w.dtype) for w in tensors}
    finest = min(w.form.group_size for w in tensors)
    fits = all(w.form.group_size % finest == 0 or w.form.group_size >= w.form.k for w in tensors)
    if len(kinds) > 1 or not fits or dim % first.dim() != _row_dim(first):
        return NotImplemented
    whole = QuantizedWeight.cat([w.quantized().regroup(finest) for w in tensors])
    return _matrix_like(first, whole)


def _row_dim(w: PackedWeight) -> int:
    return w.dim() - 1 if w.form.transposed else w.dim() - 2


def _rows(w: PackedWeight, start: int, rows: int) -> PackedWeight:
    return _matrix_like(w, w.quantized().narrow(start, rows))


def _matrix_like(w: PackedWeight, weight: QuantizedWeight) -> PackedWeight:
    form = w.form
    return PackedWeight.of(
        weight, dtype=w.dtype, transposed=form.transposed, scale_method=form.scale_method
    )


@implements("aten.index.Tensor")
def _index(w: PackedWeight, indices: Any) -> Any:
    ids = indices[0] if isinstance(w, PackedWeight) and len(indices) == 1 else None
    if not isinstance(ids, Tensor) or not w.form.experts or w.ids is not None:
        return NotImplemented
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    return PackedWeight(w.qweight, w.scale, w.form, w.dtype, ids)


@implements("aten.index_select.default")
def _index_select(w: PackedWeight, dim: int, index: Tensor) -> Any:
    return NotImplemented if dim % w.dim() else _index(w, [index])


@implements("aten.clone.default")
def _clone(w: PackedWeight, **_: Any) -> PackedWeight:
    ids = None if w.ids is None else w.ids.clone()
    return PackedWeight(w.qweight.clone(), w.scale.clone(), w.form, w.dtype, ids)


@implements("aten._to_copy.default")
def _to_copy(w: PackedWeight, **changes: Any) -> Any:
    """Another type changes what x must be, not the codes; another device may want another order."""
    dtype = changes.get("dtype") or w.dtype
    device = torch.device(changes.get("device") or w.device)
    if not dtype.is_floating_point or changes.keys() - _SAME or w.ids is not None:
        return NotImplemented
    if device.type in (w.device.type, "meta"):
        moved = w.qweight.to(device, copy=True), w.scale.to(device, copy=True)
        return PackedWeight(*moved, w.form, dtype)
    weight, form = w.quantized(), w.form
    there = (weight.qweight.to(device), weight.scale.to(device))
    return PackedWeight.of(
        QuantizedWeight(*there, weight.bits, weight.group_size, weight.shape),
        dtype=dtype,
        experts=form.experts,
        transposed=form.transposed,
        scale_method=form.scale_method,
    )


@implements("aten.copy_.default")
def _copy(w: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(w, PackedWeight) or w.ids is not None:
        return NotImplemented
    if source.shape != w.shape:
        raise FineQuantError(
            f"copy_ into a packed weight of shape {tuple(w.shape)} got one of "
            f"{tuple(source.shape)}; they must be equal"
        )
    new = source if isinstance(source, PackedWeight) else _quantized_like(w, source)
    if new.form != w.form or new.scale.dtype != w.scale.dtype or new.device != w.device:
        new = _to_copy(new, dtype=w.dtype, device=w.device)
        w.qweight, w.scale, w.form = new.qweight, new.scale, new.form
        return w
    w.qweight.copy_(new.qweight)
    w.scale.copy_(new.scale)
    return w


def _quantized_like(w: PackedWeight, source: Tensor) -> PackedWeight:
    form, scale_dtype = w.form, w.scale.dtype
    if scale_dtype == torch.float32:  # the old values may have needed it, and the new ones not
        scale_dtype = scale_dtype_beside(w.dtype)
    plan = QuantPlan(form.bits, form.group_size, form.scale_method, scale_dtype, math.nan)
    dense = source.detach().to(w.device)
    weight = quantize_weight(dense.transpose(-2, -1) if form.transposed else dense, plan)
    return PackedWeight.of(
        weight,
        dtype=w.dtype,
        experts=form.experts,
        transposed=form.transposed,
        scale_method=form.scale_method,
    )
