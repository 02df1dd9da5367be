"""7 select: one kernel for each quantised linear, fixed on its node.

The op's `kernel` argument names the template and its configuration, so neither Inductor nor the op
decides anything later; the template's layout decides how `lower` packs the weight.
"""

import math
from dataclasses import replace

import torch
from torch import fx

from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.spec import GemmSpec
from fqcompile.passes.base import GraphState, argument, example, replaced_arguments


def select(state: GraphState) -> int:
    """Set the kernel of every quantised linear; returns how many there are."""
    for op, pair in list(state.packed.items()):
        choice = select_kernel(gemm_spec(state, op))
        op.args = replaced_arguments(op, kernel=str(choice))
        state.packed[op] = replace(pair, spec=pair.spec.with_layout(choice.template.layout))
        state.matched.append(f"{op.name}: {choice}")
    return len(state.packed)


def gemm_spec(state: GraphState, op: fx.Node) -> GemmSpec:
    """What the kernels need to know of one quantised linear."""
    x, out = example(argument(op, "x")), example(op)
    assert x is not None and out is not None
    spec = state.packed[op].spec
    rows = x.shape[:-1]
    return GemmSpec(
        m=math.prod(_hint(size) for size in rows),
        n=argument(op, "n"),
        k=spec.k,
        bits=spec.bits,
        group_size=spec.group_size,
        dtype=out.dtype,
        scale_dtype=spec.scale_dtype,
        device_type=out.device.type,
        activation=argument(op, "activation"),
        gated=argument(op, "gated"),
        has_bias=argument(op, "bias") is not None,
        has_residual=argument(op, "residual") is not None,
        needs_backward=state.grad_possible,
        dynamic_m=any(isinstance(size, torch.SymInt) for size in rows),
    )


def _hint(size: int | torch.SymInt) -> int:
    """The size in the call that the graph was captured with; reading it adds no guard."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size
