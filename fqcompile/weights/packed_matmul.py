"""Matmuls with a PackedWeight, each one call of an fqcompile operator on its two tensors.

linear(x, w, b); mm, addmm, matmul with w.t()       -> fqcompile::linear
_grouped_mm(x, w.mT, offsets)                       -> fqcompile::grouped_linear
bmm(w, x), baddbmm: C rows for each expert          -> the same
bmm(w[ids], x)                                      -> fqcompile::gathered_linear

The operators are those without a backward: a gradient for x flows through the aten matmul around
this one, whose own backward multiplies with the dequantised weight.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import NoKernelError
from fqcompile.kernels.expert_ops import gathered_linear_inference, grouped_linear_inference
from fqcompile.kernels.ops import linear_inference
from fqcompile.kernels.registry import KernelChoice, select_kernel
from fqcompile.kernels.tuning.launches import tuned_launches
from fqcompile.weights.packed_form import PackedForm, Routed, spec_of
from fqcompile.weights.packed_ops import implements
from fqcompile.weights.packed_weight import PackedWeight


@cache
def kernel_for(
    form: PackedForm,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    routing: Routed | None,
) -> str | None:
    """The operator's `kernel`, for any number of rows; None where nothing reads that layout."""
    spec = spec_of(form, dtype, scale_dtype, device, routing)
    try:
        choice = select_kernel(spec, form.layout)
    except NoKernelError:
        return None
    return str(KernelChoice(choice.template, tuned_launches(spec, choice.template, "off").launches))


def _kernel(w: PackedWeight, x: Tensor, routing: Routed | None = None) -> str | None:
    if x.dtype != w.dtype:
        raise RuntimeError(
            f"expected x and the packed weight to have the same dtype, but got {x.dtype} and "
            f"{w.dtype}"
        )
    return kernel_for(w.form, x.dtype, w.scale.dtype, x.device, routing)


def _linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Any:
    """x [..., K] times ŵᵀ for the matrix [N, K] that was packed, whichever way w shows it."""
    form, kernel = w.form, _kernel(w, x)
    if kernel is None:
        return NotImplemented
    formats = (form.bits, form.group_size, form.rows, form.k, "none", False, kernel)
    return linear_inference(x, w.qweight, w.scale, bias, None, *formats)


def _experts(x: Tensor, w: PackedWeight, offsets: Tensor | None = None) -> Any:
    """x [rows, K] times each row's ŵᵀ: by offsets, or by the ids with which w was gathered."""
    form = w.form
    kernel = _kernel(w, x, "gathered" if offsets is None else "grouped")
    if kernel is None:
        return NotImplemented
    formats = (form.bits, form.group_size, form.rows, form.k, "none", False, kernel)
    op = gathered_linear_inference if offsets is None else grouped_linear_inference
    return op(x, w.qweight, w.scale, w.ids if offsets is None else offsets, None, *formats)


def _is_matrix(w: object, *, transposed: bool) -> bool:
    return isinstance(w, PackedWeight) and not w.form.experts and w.form.transposed == transposed


@implements("aten.linear.default")
def _aten_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Any:
    return _linear(x, w, bias) if _is_matrix(w, transposed=False) else NotImplemented  # type: ignore[arg-type]


@implements("aten.mm.default", "aten.matmul.default")
def _mm(x: Tensor, w: Tensor) -> Any:
    return _linear(x, w) if _is_matrix(w, transposed=True) else NotImplemented  # type: ignore[arg-type]


@implements("aten.addmm.default")
def _addmm(bias: Tensor, x: Tensor, w: Tensor, beta: float = 1, alpha: float = 1) -> Any:
    if not _is_matrix(w, transposed=True) or (beta, alpha) != (1, 1):
        return NotImplemented
    assert isinstance(w, PackedWeight)
    if bias.dim() == 1 and bias.shape[0] == w.form.rows:
        return _linear(x, w, bias)
    y = _linear(x, w)
    return y if y is NotImplemented else y + bias


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
    return _experts(x, w, offs)  # type: ignore[arg-type]


@implements("transformers.grouped_mm_fallback.default")
def _grouped_mm_fallback(x: Tensor, w: Tensor, offs: Tensor) -> Any:
    """Hugging Face's grouped matmul for types that PyTorch's does not take."""
    return _grouped_mm(x, w, offs)


def _is_stack(w: object, *, transposed: bool) -> bool:
    if not isinstance(w, PackedWeight) or w.form.transposed != transposed:
        return False
    return w.form.experts > 0 and w.ids is None


@implements("aten.bmm.default")
def _bmm(a: Tensor, b: Tensor) -> Any:
    """[P, C, K] @ [P, K, N], or [P, N, K] @ [P, K, C]."""
    if isinstance(b, PackedWeight) and not isinstance(a, PackedWeight) and b.form.transposed:
        return _each(a, b)
    if isinstance(a, PackedWeight) and not isinstance(b, PackedWeight) and not a.form.transposed:
        y = _each(b.transpose(1, 2), a)
        return y if y is NotImplemented else y.transpose(1, 2)
    return NotImplemented


@implements("aten.baddbmm.default")
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    y = _bmm(a, b) if (beta, alpha) == (1, 1) else NotImplemented
    return y if y is NotImplemented else y + bias


def _each(x: Tensor, w: PackedWeight) -> Any:
    """x [P, C, K]: C rows for each of P experts, gathered or all of the stack. [P, C, N]"""
    experts, rows, k = x.shape
    flat = x.reshape(experts * rows, k)
    if w.ids is None:
        offsets = torch.arange(1, experts + 1, device=x.device, dtype=torch.int32) * rows
        y = _experts(flat, w, offsets)
    else:
        ids = w.ids if isinstance(rows, int) and rows == 1 else w.ids.repeat_interleave(rows)
        y = _experts(flat, PackedWeight(w.qweight, w.scale, w.form, w.dtype, ids))
    return y if y is NotImplemented else y.view(experts, rows, w.form.rows)
