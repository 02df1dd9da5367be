"""Matmuls with a PackedWeight: each is one call of `fqcompile::matmul` on its codes and scales.

t(w), transpose, permute                            -> the same memory, read the other way round
linear(x, w, b); mm, addmm, matmul with w.t()       -> matmul(x, w, b)
_grouped_mm(x, w.mT, offsets)                       -> matmul(x, w, offsets)
bmm(w, x), baddbmm: C rows for each expert          -> the same
bmm(w[ids], x)                                      -> matmul(x, w, ids)
attention and layers in one call                    -> their linears, one by one (`composites`)

The operator is the one without a backward: a gradient for x flows through the aten matmul around
this one, whose own backward multiplies with the dequantized weight.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fqcompile.kernels.op import matmul_inference
from fqcompile.kernels.registry import Routed, kernel_for
from fqcompile.tensor.format import Format
from fqcompile.torch_compat import return_and_correct_aliasing
from fqcompile.weights import composites
from fqcompile.weights.dense_view import densely
from fqcompile.weights.memory import Place
from fqcompile.weights.parameter import HANDLERS, PackedWeight

Handler = Callable[..., Any]


def implements(*names: str, view: bool = False) -> Callable[[Handler], Handler]:
    """Register `handler(*args, **kwargs)`; if it returns NotImplemented, `densely` runs instead.

    `view`: the result shares its argument's memory, which autograd has to know.
    """

    def register(handler: Handler) -> Handler:
        @wraps(handler)
        def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = handler(*args, **kwargs)
            if result is NotImplemented:
                return densely(func, args, kwargs)
            return return_and_correct_aliasing(func, args, kwargs, result) if view else result

        HANDLERS.update(dict.fromkeys(names, answer))
        return handler

    return register


@implements("aten.detach.default", "aten.alias.default", "aten.lift_fresh.default", view=True)
def same(w: PackedWeight) -> PackedWeight:
    """Another tensor that shows the same part of the same memory."""
    return PackedWeight.showing(w.memory, w.dtype, w.place, flipped=w.flipped, ids=w.ids)


@implements("aten.t.default", view=True)
def _t(w: PackedWeight) -> Any:
    *sizes, rows, columns = w.size()
    *strides, row, column = w.stride()
    turned = Place((*sizes, columns, rows), (*strides, column, row), w.storage_offset())
    return PackedWeight.showing(w.memory, w.dtype, turned, flipped=not w.flipped, ids=w.ids)


@implements("aten.transpose.int", view=True)
def _transpose(w: PackedWeight, dim0: int, dim1: int) -> Any:
    dims = {dim0 % w.dim(), dim1 % w.dim()}
    return _t(w) if dims == {w.dim() - 2, w.dim() - 1} else NotImplemented


@implements("aten.permute.default", view=True)
def _permute(w: PackedWeight, dims: Any) -> Any:
    order, last = [d % w.dim() for d in dims], list(range(w.dim()))
    if order == last:
        return same(w)
    last[-2:] = last[:-3:-1]
    return _t(w) if order == last else NotImplemented


def _kernel(w: PackedWeight, form: Format, x: Tensor, routing: Routed | None = None) -> str | None:
    if x.dtype != w.dtype:
        raise RuntimeError(
            f"expected x and the packed weight to have the same dtype, but got {x.dtype} and "
            f"{w.dtype}"
        )
    return kernel_for(form, x.dtype, w.scale.dtype, x.device, routing)


def _linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Any:
    """x [..., K] times ŵᵀ for the matrix [N, K] that was packed, whether or not w is transposed."""
    if x.is_nested:
        return torch.nn.functional.linear(
            x, w.dequantized() if not w.format.transposed else w.dequantized().t(), bias
        )
    weight = w.memory.weight
    form = weight.format
    kernel = _kernel(w, form, x)
    if kernel is None:
        return NotImplemented
    formats = (form.bits, form.levels, form.group_size, form.rows, form.k, "none", False, kernel)
    unrouted = (None, None, False)
    return matmul_inference(x, weight.qweight, weight.scale, bias, None, *formats, *unrouted)


def _experts(
    x: Tensor,
    w: PackedWeight,
    offsets: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    zero_rest: bool = False,
) -> Any:
    """x [rows, K] times ŵᵀ of each row's expert, which offsets or ids give."""
    weight = w.memory.weight
    form = weight.format
    kernel = _kernel(w, form, x, "gathered" if offsets is None else "grouped")
    if kernel is None:
        return NotImplemented
    formats = (form.bits, form.levels, form.group_size, form.rows, form.k, "none", False, kernel)
    routing = (offsets, ids, zero_rest)
    return matmul_inference(x, weight.qweight, weight.scale, None, None, *formats, *routing)


def _is_matrix(w: object, *, transposed: bool) -> TypeGuard[PackedWeight]:
    if not isinstance(w, PackedWeight):
        return False
    form = w.memory.weight.format
    return not form.experts and (form.transposed != w.flipped) == transposed


@implements("aten.linear.default")
def _aten_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Any:
    if not _is_matrix(w, transposed=False):
        return NotImplemented
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (w.memory.weight.format.rows,)):
        return NotImplemented
    return _linear(x, w, bias)


@implements("aten.matmul.default")
def _matmul(x: Tensor, w: Tensor) -> Any:
    return _linear(x, w) if _is_matrix(w, transposed=True) else NotImplemented


@implements("aten.mm.default")
def _mm(x: Tensor, w: Tensor) -> Any:
    return _matmul(x, w) if x.dim() == 2 else NotImplemented


@implements("aten.addmm.default")
def _addmm(bias: Tensor, x: Tensor, w: Tensor, beta: float = 1, alpha: float = 1) -> Any:
    plain = x.dim() == 2 and bias.dtype == x.dtype
    if not plain or not _is_matrix(w, transposed=True):
        return NotImplemented
    if (beta, alpha) != (1, 1):
        return composites.addmm(bias, x, w, beta=beta, alpha=alpha)
    # A bias of another shape broadcasts or is an error, as in the dense call.
    if bias.shape == (w.memory.weight.format.rows,):
        return _linear(x, w, bias)
    return _plus(_linear(x, w), bias)


implements("aten._native_multi_head_attention.default")(composites.native_multi_head_attention)
implements("aten._transformer_encoder_layer_fwd.default")(composites.transformer_encoder_layer)


def _plus(y: Any, bias: Tensor) -> Any:
    """y + bias as in the dense call, where the bias may broadcast but the product may not."""
    return y if y is NotImplemented else y + bias.expand_as(y)


@implements("aten._grouped_mm.default")
def _grouped_mm(
    x: Tensor,
    w: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    plain = bias is None and out_dtype in (None, x.dtype)
    if not plain or offs is None or x.dim() != 2 or not _is_stack(w, transposed=True):
        return NotImplemented
    if offs.dtype != torch.int32:
        return NotImplemented
    return _experts(x, w, offs)


@implements("transformers.grouped_mm_fallback.default")
def _grouped_mm_fallback(x: Tensor, w: Tensor, offs: Tensor) -> Any:
    """Hugging Face's grouped matmul for dtypes that PyTorch's does not support.

    It sets rows beyond the last offset to zero.
    """
    if x.dim() != 2 or not _is_stack(w, transposed=True) or offs.shape != w.shape[:1]:
        return NotImplemented
    return _experts(x, w, offs, zero_rest=True)


def _is_stack(w: object, *, transposed: bool) -> TypeGuard[PackedWeight]:
    if not isinstance(w, PackedWeight) or w.format.transposed != transposed:
        return False
    return w.format.experts > 0 and w.ids is None


@implements("aten.bmm.default")
def _bmm(a: Tensor, b: Tensor) -> Any:
    """[P, C, K] @ [P, K, N], or [P, N, K] @ [P, K, C]."""
    if isinstance(b, PackedWeight) and not isinstance(a, PackedWeight) and b.format.transposed:
        return _each(a, b)
    if isinstance(a, PackedWeight) and not isinstance(b, PackedWeight) and not a.format.transposed:
        y = _each(b.transpose(-2, -1), a) if b.dim() == 3 else NotImplemented
        return y if y is NotImplemented else y.transpose(1, 2)
    return NotImplemented


@implements("aten.baddbmm.default")
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    plain = (beta, alpha) == (1, 1) and bias.dtype == a.dtype
    return _plus(_bmm(a, b), bias) if plain else NotImplemented


def _each(x: Tensor, w: PackedWeight) -> Any:
    """[P, C, N] of x [P, C, K]: C rows for each of P experts, gathered ones or the whole stack."""
    if x.dim() != 3 or x.shape[0] != w.shape[0] or x.shape[2] != w.format.k:
        return NotImplemented
    experts, rows, k = x.shape
    flat = x.reshape(experts * rows, k)
    if w.ids is None:
        offsets = torch.arange(1, experts + 1, device=x.device, dtype=torch.int32) * rows
        y = _experts(flat, w, offsets)
    else:
        ids = w.ids if isinstance(rows, int) and rows == 1 else w.ids.repeat_interleave(rows)
        y = _experts(flat, w, ids=ids)
    return y if y is NotImplemented else y.view(experts, rows, w.format.rows)
