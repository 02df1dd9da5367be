"""The operators that rewritten graphs and eager packed weights call, in the namespace `fqcompile`.

    fqcompile::matmul      act(x @ ŵᵀ + bias) + residual       x [..., K] -> [..., N]
      with offsets [E]     x [S, K] is sorted by expert; these are the ends of the experts' rows
      with ids [P]         x [P, K], and each row's expert
                           act(x[p] @ ŵ[e(p)]ᵀ + bias[e(p)])   -> [S or P, N], no residual
    fqcompile::matmul.inference  the same without a backward, which saves 7 us per call outside of
                           CUDA graphs; called if no gradient can flow
    fqcompile::matmul_backward   dx = dz @ ŵ[e(p)] of routed rows
    fqcompile::dequantize  ŵ [rows, K]: for the backward of one matrix, which a second derivative
                           must see as a matmul, and for callers that need the dense weight
    fqcompile::rows        ŵ[ids] of one matrix, as an embedding reads it: [..., K] of ids [...]

Rows of x past the last offset belong to no expert: their results are undefined, as in
`torch._grouped_mm`, or zeros with `zero_rest`; their gradients are zeros.
No argument has a default: Inductor would pass it by name, which costs 1 us per call.

Under autocast x, bias and residual are cast to the current autocast dtype, as `F.linear` does, and
the packed weight is not; `torch.library.register_autocast` would cast scales too, and to a dtype
fixed at import. Routed rows are not cast, because grouped matmuls have no autocast rule: if one is
rewritten under autocast, the casts are in the graph. The packed weight itself is constant.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import expect_true

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import parse_kernel
from fqcompile.kernels.run import (
    check_backward,
    check_matmul,
    checked_weight,
    dequantize_weight,
    experts_in,
    on_one_device,
    run_backward,
    run_matmul,
)
from fqcompile.kernels.template import Routing, dequantize_plain
from fqcompile.native import interface
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.torch_compat import key_set, without_keys

# Compiled graphs are cached on disk by the graph and this: another version of the operators, whose
# calls or backward graphs differ, does not find them.
_HERE = Path(__file__)
_DEFINED_IN = (_HERE, _HERE.parent / "cpu" / "attention.py", Path(interface.__file__))
_digest = hashlib.sha256(b"".join(path.read_bytes() for path in _DEFINED_IN))
CACHE_TAG = f"fqcompile:{_digest.hexdigest()[:16]}"


def _matmul_impl(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    levels: str,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    kernel: str,
    offsets: Tensor | None,
    ids: Tensor | None,
    zero_rest: bool,
) -> Tensor:
    routing = None if offsets is None and ids is None else Routing(offsets, ids)
    experts, rows = None if routing is None else experts_in(qweight), 2 * n if gated else n
    form = (bits, levels, group_size, rows, k)
    weight = checked_weight(kernel, activation, experts, qweight, scale, *form)
    epilogue = Epilogue(bias, residual, activation, gated)
    check_matmul(x, weight, routing, epilogue, zero_rest)
    if x.dim() == 2 and x.numel() and n:
        y = run_matmul(x, weight, routing, epilogue, kernel)
        if zero_rest:
            _zero_rest(y, offsets)
        return y
    leading = x.shape[:-1]
    m = math.prod(leading)
    if m * n == 0:
        return x.new_empty((*leading, n))
    if residual is not None:
        epilogue = epilogue._replace(residual=residual.reshape(m, n))
    return run_matmul(x.reshape(m, k), weight, None, epilogue, kernel).view(*leading, n)


def _zero_rest(y: Tensor, offsets: Tensor | None) -> None:
    """Rows beyond the last offset, on a GPU without waiting for it."""
    assert offsets is not None, "checked before"
    if y.is_cpu:
        y[int(offsets[-1]) :].zero_()
    else:
        rows = torch.arange(y.shape[0], device=y.device)
        y.masked_fill_((rows >= offsets[-1]).unsqueeze(1), 0)


def _matmul_fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    levels: str,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    kernel: str,
    offsets: Tensor | None,
    ids: Tensor | None,
    zero_rest: bool,
) -> Tensor:
    routing = None if offsets is None and ids is None else Routing(offsets, ids)
    experts, rows = None if routing is None else experts_in(qweight), 2 * n if gated else n
    form = (bits, levels, group_size, rows, k)
    weight = checked_weight(kernel, activation, experts, qweight, scale, *form)
    epilogue = Epilogue(bias, residual, activation, gated)
    check_matmul(x, weight, routing, epilogue, zero_rest, holds=expect_true)
    return x.new_empty((*x.shape[:-1], n))


def _stack(kernel: str, qweight: Tensor, *form: Any) -> QuantizedTensor:
    return checked_weight(kernel, "none", experts_in(qweight), qweight, *form)


def _backward_impl(dz: Tensor, *arguments: Any) -> Tensor:
    *form, kernel, offsets, ids = arguments
    weight, routing = _stack(kernel, *form), Routing(offsets, ids)
    check_backward(dz, weight, routing)
    return run_backward(dz, weight, routing, kernel)


def _backward_fake(dz: Tensor, *arguments: Any) -> Tensor:
    *form, kernel, offsets, ids = arguments
    weight = _stack(kernel, *form)
    check_backward(dz, weight, Routing(offsets, ids), holds=expect_true)
    return dz.new_empty((dz.shape[0], weight.k))


def _dequantize_impl(*arguments: Any) -> Tensor:
    *form, dtype, kernel = arguments
    return dequantize_weight(checked_weight(kernel, "none", None, *form), dtype, kernel)


def _dequantize_fake(*arguments: Any) -> Tensor:
    *form, dtype, kernel = arguments
    weight = checked_weight(kernel, "none", None, *form)
    return weight.qweight.new_empty(weight.shape, dtype=dtype)


def _rows_impl(qweight: Tensor, scale: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
    *form, dtype, kernel = arguments
    weight = checked_weight(kernel, "none", None, qweight, scale, *form)
    some = parse_kernel(kernel).template.layout.take(weight, ids.flatten())
    return dequantize_plain(some, dtype).view(*ids.shape, weight.k)


def _rows_fake(qweight: Tensor, scale: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
    *form, dtype, kernel = arguments
    weight = checked_weight(kernel, "none", None, qweight, scale, *form)
    return qweight.new_empty((*ids.shape, weight.k), dtype=dtype)


_library = torch.library.Library("fqcompile", "DEF")
for _name, _impl, _fake in (
    ("matmul", _matmul_impl, _matmul_fake),
    ("matmul.inference", _matmul_impl, _matmul_fake),
    ("matmul_backward", _backward_impl, _backward_fake),
    ("dequantize", _dequantize_impl, _dequantize_fake),
    ("rows", _rows_impl, _rows_fake),
):
    interface.define(_library, _name)
    _library.impl(_name, _impl, "CPU")
    _library.impl(_name, on_one_device(_impl), "CUDA")
    torch.library.register_fake(f"fqcompile::{_name}", on_one_device(_fake), lib=_library)

matmul = torch.ops.fqcompile.matmul.default
matmul_inference = torch.ops.fqcompile.matmul.inference
matmul_backward = torch.ops.fqcompile.matmul_backward.default
dequantize = torch.ops.fqcompile.dequantize.default
rows = torch.ops.fqcompile.rows.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, bias, _, *form, offsets, ids, _ = inputs
    ctx.save_for_backward(x, qweight, scale, bias, offsets, ids)
    ctx.form = form


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dz through the activation (its pre-activation recomputed), then dx = dz @ ŵ."""
    x, qweight, scale, bias, offsets, ids = ctx.saved_tensors
    bits, levels, group_size, n, k, activation, gated, kernel = ctx.form
    form = (bits, levels, group_size, 2 * n if gated else n, k)
    dz = dy
    if gated or activation != "none":
        template = kernel.partition(":")[0]  # a configuration tuned for the fused form stays there
        plain = ("none", False, template, offsets, ids, False)
        z = matmul(x, qweight, scale, bias, None, *form, *plain)
        dz = Epilogue(activation=activation, gated=gated).backward(dy, z)
    dx = dbias = None
    routed = offsets is not None or ids is not None
    if ctx.needs_input_grad[0]:
        wide = dz.to(x.dtype)
        if routed:
            dx = matmul_backward(wide, qweight, scale, *form, kernel, offsets, ids)
        else:
            dx = wide @ dequantize(qweight, scale, *form, x.dtype, kernel)
    if bias is not None and ctx.needs_input_grad[3]:
        dbias = _bias_gradient(dz, bias, offsets, ids)
    dresidual = dy if ctx.needs_input_grad[4] else None
    return (dx, None, None, dbias, dresidual, *(None,) * 11)


def _bias_gradient(dz: Tensor, bias: Tensor, offsets: Tensor | None, ids: Tensor | None) -> Tensor:
    """The sum over all rows, or each expert's over its own [E, rows of one]."""
    if offsets is not None:
        rows = torch.arange(dz.shape[0], device=dz.device, dtype=offsets.dtype)
        ids = torch.searchsorted(offsets, rows, right=True)
        dz = torch.where((ids < bias.shape[0]).unsqueeze(1), dz, 0)
        ids = ids.clamp(max=bias.shape[0] - 1)
    if ids is None:
        return dz.reshape(-1, bias.shape[0]).sum(0).to(bias.dtype)
    zeros = dz.new_zeros(bias.shape)
    return zeros.index_add(0, ids.remainder(bias.shape[0]), dz).to(bias.dtype)


torch.library.register_autograd(matmul, _backward, setup_context=_setup_context, lib=_library)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scale, *form, kernel, offsets, ids = inputs
    ctx.save_for_backward(qweight, scale, offsets, ids)
    ctx.form, ctx.kernel = form, kernel.partition(":")[0]


def _second_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    """ddz = ddx @ ŵᵀ: dx is linear in dz, and zero for rows of no expert."""
    qweight, scale, offsets, ids = ctx.saved_tensors
    plain = ("none", False, ctx.kernel, offsets, ids, offsets is not None)
    return (matmul(ddx, qweight, scale, None, None, *ctx.form, *plain), *(None,) * 10)


torch.library.register_autograd(
    matmul_backward, _second_backward, setup_context=_setup_second, lib=_library
)


def _register_autocast(device_type: str, op: Any, name: str) -> None:
    key = f"Autocast{device_type.upper()}"
    excluded = key_set(key)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def autocast_matmul(
        x: Tensor,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        routed = any(isinstance(value, Tensor) for value in rest)
        values = (x, bias, residual) if routed else tuple(map(cast, (x, bias, residual)))
        with without_keys(excluded):
            y: Tensor = op(values[0], qweight, scale, *values[1:], *rest)
            return y

    _library.impl(name, autocast_matmul, key)


for _device in ("cpu", "cuda"):
    _register_autocast(_device, matmul, "matmul")
    _register_autocast(_device, matmul_inference, "matmul.inference")
