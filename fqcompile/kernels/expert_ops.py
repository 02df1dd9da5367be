"""The operators of experts: a stack of packed weights, and rows of x that each go to one.

    fqcompile::grouped_linear    x [S, K] sorted by expert, offsets [E]: ends of the experts' rows
    fqcompile::gathered_linear   x [P, K], ids [P]: each row's expert
                                 act(x[p] @ ŵ[e(p)]ᵀ + bias[e(p)])          -> [S or P, N]
    fqcompile::experts_backward  dx = dz @ ŵ[e(p)]

Rows of a grouped x beyond the last offset belong to no expert: their results, like those of
`torch._grouped_mm`, are whatever was in memory, with `zero_rest` zeros; their gradients are zeros.
`.inference` is for graphs without gradients, as in `ops`. None has an autocast rule, as grouped
matmuls have none; where a matmul under autocast is rewritten, the casts are in the graph.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import expect_true

from fqcompile.kernels.arguments import check_experts, check_experts_backward, on_one_device
from fqcompile.kernels.epilogue import epilogue_backward
from fqcompile.kernels.execute import run_experts, run_experts_backward
from fqcompile.kernels.template import PackedLinear

_SCHEMA = (
    "{}(Tensor x, Tensor qweight, Tensor scale, Tensor {}, Tensor? bias, int bits, int group_size, "
    "int n, int k, str activation, bool gated, str kernel{}) -> Tensor"
)
_BACKWARD_SCHEMA = (
    "experts_backward(Tensor dz, Tensor qweight, Tensor scale, Tensor? offsets, Tensor? ids, "
    "int bits, int group_size, int rows, int k, str kernel) -> Tensor"
)
_ROUTINGS = {
    "grouped_linear": ("offsets", ", bool zero_rest=False"),
    "gathered_linear": ("ids", ""),
}

_FORM = 8  # arguments from the bias to the kernel

_library = torch.library.Library("fqcompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _run(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    kernel: str,
) -> Tensor:
    form = (bits, group_size, n, k, activation, gated, kernel)
    check_experts(x, qweight, scale, offsets, ids, bias, *form)
    rows = 2 * n if gated else n
    if x.shape[0] * n == 0:
        return x.new_empty((x.shape[0], n))
    weight = PackedLinear(qweight, scale, bits, group_size, rows, k)
    return run_experts(x, weight, offsets, ids, bias, activation, gated, kernel)


def _grouped(x: Tensor, qweight: Tensor, scale: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    form, zero_rest = rest[:_FORM], rest[_FORM:]  # the dispatcher leaves out a last default
    y = _run(x, qweight, scale, offsets, None, *form)
    if zero_rest == (True,):
        _zero_rest(y, offsets)
    return y


def _zero_rest(y: Tensor, offsets: Tensor) -> None:
    """Rows beyond the last offset, on a GPU without waiting for it."""
    if y.is_cpu:
        y[int(offsets[-1]) :].zero_()
    else:
        rows = torch.arange(y.shape[0], device=y.device)
        y.masked_fill_((rows >= offsets[-1]).unsqueeze(1), 0)


def _gathered(x: Tensor, qweight: Tensor, scale: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    return _run(x, qweight, scale, None, ids, *rest)


def _grouped_fake(x: Tensor, qweight: Tensor, scale: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    check_experts(x, qweight, scale, offsets, None, *rest[:_FORM], holds=expect_true)
    return x.new_empty((x.shape[0], rest[3]))


def _gathered_fake(x: Tensor, qweight: Tensor, scale: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    check_experts(x, qweight, scale, None, ids, *rest, holds=expect_true)
    return x.new_empty((x.shape[0], rest[3]))


def _backward_impl(dz: Tensor, qweight: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    check_experts_backward(dz, qweight, scale, *rest)
    offsets, ids, bits, group_size, rows, k, kernel = rest
    weight = PackedLinear(qweight, scale, bits, group_size, rows, k)
    return run_experts_backward(dz, weight, offsets, ids, kernel)


def _backward_fake(dz: Tensor, qweight: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    check_experts_backward(dz, qweight, scale, *rest, holds=expect_true)
    return dz.new_empty((dz.shape[0], rest[5]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.form = inputs[5:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dz through the activation (its pre-activation recomputed), then dx and the bias's share."""
    x, qweight, scale, routing, bias = ctx.saved_tensors
    bits, group_size, n, k, act, gated, kernel, *_ = ctx.form
    rows = 2 * n if gated else n
    dz = dy
    if gated or act != "none":
        template = kernel.partition(":")[0]
        plain = (bits, group_size, rows, k, "none", False, template)
        dz = epilogue_backward(dy, ctx.op(x, qweight, scale, routing, bias, *plain), act, gated)
    offsets, ids = (routing, None) if ctx.op is grouped_linear else (None, routing)
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        form = (bits, group_size, rows, k, kernel)
        dx = experts_backward(dz.to(x.dtype), qweight, scale, offsets, ids, *form)
    if bias is not None and ctx.needs_input_grad[4]:
        dbias = _bias_gradient(dz, bias, offsets, ids)
    return (dx, None, None, None, dbias, *(None,) * len(ctx.form))


def _bias_gradient(dz: Tensor, bias: Tensor, offsets: Tensor | None, ids: Tensor | None) -> Tensor:
    """Each expert's sum over its rows [E, rows of one]."""
    experts = bias.shape[0]
    if offsets is not None:
        rows = torch.arange(dz.shape[0], device=dz.device, dtype=offsets.dtype)
        ids = torch.searchsorted(offsets, rows, right=True)
        dz = torch.where((ids < experts).unsqueeze(1), dz, 0)
        ids = ids.clamp(max=experts - 1)
    assert ids is not None
    zeros = dz.new_zeros(bias.shape)
    return zeros.index_add(0, ids.remainder(experts), dz).to(bias.dtype)


_IMPLEMENTATIONS = {"grouped_linear": _grouped, "gathered_linear": _gathered}
_FAKES = {"grouped_linear": _grouped_fake, "gathered_linear": _gathered_fake}
for _name, _routing in _ROUTINGS.items():
    for _overload in (_name, f"{_name}.inference"):
        _library.define(_SCHEMA.format(_overload, *_routing), tags=_TAGS)
        _library.impl(_overload, _IMPLEMENTATIONS[_name], "CPU")
        _library.impl(_overload, on_one_device(_IMPLEMENTATIONS[_name]), "CUDA")
        torch.library.register_fake(
            f"fqcompile::{_overload}", on_one_device(_FAKES[_name]), lib=_library
        )
_library.define(_BACKWARD_SCHEMA, tags=_TAGS)
_library.impl("experts_backward", _backward_impl, "CPU")
_library.impl("experts_backward", on_one_device(_backward_impl), "CUDA")
torch.library.register_fake(
    "fqcompile::experts_backward", on_one_device(_backward_fake), lib=_library
)

grouped_linear = torch.ops.fqcompile.grouped_linear.default
grouped_linear_inference = torch.ops.fqcompile.grouped_linear.inference
gathered_linear = torch.ops.fqcompile.gathered_linear.default
gathered_linear_inference = torch.ops.fqcompile.gathered_linear.inference
experts_backward = torch.ops.fqcompile.experts_backward.default


def _with_op(op: Any) -> Any:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = op
        _setup_context(ctx, inputs, output)

    return setup


for _op in (grouped_linear, gathered_linear):
    torch.library.register_autograd(_op, _backward, setup_context=_with_op(_op), lib=_library)
