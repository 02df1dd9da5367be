"""The operators that rewritten graphs call, in the namespace `fqcompile`.

    fqcompile::linear      act(x @ ŵᵀ + bias) + residual       x [..., K] -> [..., N]
    fqcompile::linear.inference  the same without a backward, which is 7 us of every call outside of
                           CUDA graphs: what graphs call where no gradient can flow
    fqcompile::dequantize  ŵ [rows, K], for the backward pass and for whoever wants the dense weight

Each has a schema, a fake, one implementation that checks its arguments (see `arguments`) and calls
the template named in `kernel`, an autocast rule (as `F.linear`: x, bias and residual are cast, the
packed weight is not) and a backward for x, bias and residual. The packed weight itself is constant.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import expect_true

from fqcompile.kernels.arguments import check_linear, check_weight, on_one_device
from fqcompile.kernels.epilogue import epilogue_backward
from fqcompile.kernels.execute import dequantize_weight, run_linear
from fqcompile.kernels.template import PackedLinear
from fqcompile.torch_compat import key_set, without_keys

LINEAR_SCHEMA = (
    "linear{}(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, Tensor? residual, int bits, "
    "int group_size, int n, int k, str activation, bool gated, str kernel) -> Tensor"
)
DEQUANTIZE_SCHEMA = (
    "dequantize(Tensor qweight, Tensor scale, int bits, int group_size, int rows, int k, "
    "ScalarType dtype, str kernel) -> Tensor"
)

# Compiled graphs are cached on disk by the graph and this: another version of the operators, whose
# calls or backward graphs differ, does not find them.
_SOURCES = sorted(Path(__file__).parent.glob("*ops.py"))
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()
CACHE_TAG = f"fqcompile:{_DIGEST[:16]}"

_library = torch.library.Library("fqcompile", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(LINEAR_SCHEMA.format(""), tags=_TAGS)
_library.define(LINEAR_SCHEMA.format(".inference"), tags=_TAGS)
_library.define(DEQUANTIZE_SCHEMA, tags=_TAGS)

linear = torch.ops.fqcompile.linear.default
linear_inference = torch.ops.fqcompile.linear.inference
dequantize = torch.ops.fqcompile.dequantize.default


def _linear_impl(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    kernel: str,
) -> Tensor:
    check_linear(
        x, qweight, scale, bias, residual, bits, group_size, n, k, activation, gated, kernel
    )
    weight = PackedLinear(qweight, scale, bits, group_size, 2 * n if gated else n, k)
    if x.dim() == 2 and x.numel() and n:
        return run_linear(x, weight, bias, residual, activation, gated, kernel)
    leading = x.shape[:-1]
    rows = math.prod(leading)
    if rows * n == 0:
        return x.new_empty((*leading, n))
    flat = None if residual is None else residual.reshape(rows, n)
    y = run_linear(x.reshape(rows, k), weight, bias, flat, activation, gated, kernel)
    return y.view(*leading, n)


def _dequantize_impl(
    qweight: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    rows: int,
    k: int,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    check_weight(qweight, scale, bits, group_size, rows, k, kernel)
    weight = PackedLinear(qweight, scale, bits, group_size, rows, k)
    return dequantize_weight(weight, dtype, kernel)


for _name in ("linear", "linear.inference"):
    _library.impl(_name, _linear_impl, "CPU")
    _library.impl(_name, on_one_device(_linear_impl), "CUDA")
_library.impl("dequantize", _dequantize_impl, "CPU")
_library.impl("dequantize", on_one_device(_dequantize_impl), "CUDA")


@torch.library.register_fake("fqcompile::linear.inference")
@torch.library.register_fake("fqcompile::linear")
@on_one_device
def _linear_fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    kernel: str,
) -> Tensor:
    form = (bits, group_size, n, k, activation, gated, kernel)
    check_linear(x, qweight, scale, bias, residual, *form, holds=expect_true)
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("fqcompile::dequantize")
@on_one_device
def _dequantize_fake(
    qweight: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    rows: int,
    k: int,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    check_weight(qweight, scale, bits, group_size, rows, k, kernel)
    return qweight.new_empty((rows, k), dtype=dtype)


def _setup_linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, bias, *_ = inputs
    _, _, _, _, _, bits, group_size, n, k, act, gated, kernel = inputs
    ctx.save_for_backward(x, qweight, scale, bias)
    ctx.format = (bits, group_size, n, k, act, gated, kernel)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dz through the activation (its pre-activation recomputed), then dx = dz @ ŵ."""
    x, qweight, scale, bias = ctx.saved_tensors
    bits, group_size, n, k, act, gated, kernel = ctx.format
    rows = 2 * n if gated else n
    dz = dy
    if gated or act != "none":
        template = kernel.partition(":")[0]  # a configuration tuned for the fused form stays there
        z = linear(
            x, qweight, scale, bias, None, bits, group_size, rows, k, "none", False, template
        )
        dz = epilogue_backward(dy, z, act, gated)
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        w_hat = dequantize(qweight, scale, bits, group_size, rows, k, x.dtype, kernel)
        dx = dz.to(x.dtype) @ w_hat
    if bias is not None and ctx.needs_input_grad[3]:
        dbias = dz.reshape(-1, rows).sum(0).to(bias.dtype)
    dresidual = dy if ctx.needs_input_grad[4] else None
    return (dx, None, None, dbias, dresidual, *(None,) * 7)


torch.library.register_autograd(
    "fqcompile::linear", _linear_backward, setup_context=_setup_linear_context
)


def _register_autocast(device_type: str, op: Any, name: str) -> None:
    key = f"Autocast{device_type.upper()}"
    excluded = key_set(key)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def autocast_linear(
        x: Tensor,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        with without_keys(excluded):
            packed = (qweight, scale)
            y: Tensor = op(cast(x), *packed, cast(bias), cast(residual), *rest)
            return y

    _library.impl(name, autocast_linear, key)


for _device in ("cpu", "cuda"):
    _register_autocast(_device, linear, "linear")
    _register_autocast(_device, linear_inference, "linear.inference")
