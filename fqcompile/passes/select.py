"""7 select: one kernel for each quantized matmul, fixed on its node.

The op's `kernel` argument names the template and its configurations by number of rows, from a tuned
table, a search, or the heuristic; so neither Inductor nor the op decides anything later. `lower`
packs the weight in the template's layout.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import fx

from fqcompile.kernels.registry import dequantized_because, select_kernel
from fqcompile.kernels.spec import GemmSpec, gpu_of
from fqcompile.kernels.tuning.launches import Mode, tuned_launches
from fqcompile.passes.op_nodes import INFERENCE, argument, changed
from fqcompile.passes.state import GraphState, example

_NO_BOUND = 1 << 40  # Dynamo's upper bound of an unbounded size is larger


def select(state: GraphState) -> int:
    """Set the kernel of every quantized matmul; return the number of matmuls."""
    for op, weight in list(state.packed.items()):
        spec = gemm_spec(state, op)
        choice = select_kernel(spec)
        with _current(example(op)):
            chosen = tuned_launches(spec, choice.template, cast(Mode, state.config.autotune))
        choice = replace(choice, launches=chosen.launches)
        slow = dequantized_because(spec)
        notes = chosen.notes if slow is None else (f"{slow}: each call dequantizes the weight",)
        state.warnings += [f"{op.name}: {note}" for note in notes]
        op.target, op.args = changed(op, kernel=str(choice))
        if not state.grad_possible:
            op.target = INFERENCE
        state.gemms[op] = spec
        state.packed[op] = replace(weight, layout=choice.template.layout)
        source = "" if chosen.launches is None else f" ({chosen.source})"
        state.matched.append(f"{op.name}: {choice}{source}")
    return len(state.packed)


def gemm_spec(state: GraphState, op: fx.Node) -> GemmSpec:
    """The GemmSpec of one quantized matmul, the input of kernel selection."""
    x, out = example(argument(op, "x")), example(op)
    assert x is not None and out is not None
    spec = state.packed[op]
    rows = x.shape[:-1]
    return GemmSpec(
        m=math.prod(_hint(size) for size in rows),
        n=argument(op, "n"),
        k=spec.k,
        bits=spec.bits,
        levels=spec.levels,
        group_size=spec.group_size,
        dtype=out.dtype,
        scale_dtype=spec.scale_dtype,
        device_type=out.device.type,
        activation=argument(op, "activation"),
        gated=argument(op, "gated"),
        has_bias=argument(op, "bias") is not None,
        has_residual=argument(op, "residual") is not None,
        needs_backward=state.grad_possible,
        m_range=_range(math.prod(rows)),
        gpu=gpu_of(out.device) if out.is_cuda and torch.cuda.is_available() else None,
        experts=spec.experts,
        routing=_routing(op),
    )


def _routing(op: fx.Node) -> Literal["grouped", "gathered"] | None:
    if argument(op, "offsets") is not None:
        return "grouped"
    return None if argument(op, "ids") is None else "gathered"


def _current(out: torch.Tensor | None) -> AbstractContextManager[object]:
    """The device context for a search, which measures on the current device."""
    assert out is not None
    return torch.cuda.device(out.device) if out.is_cuda else nullcontext()


def _range(rows: int | torch.SymInt) -> tuple[int, int | None] | None:
    """The smallest and largest number of rows that the graph's guards allow; None if static."""
    if not isinstance(rows, torch.SymInt):
        return None
    values = rows.node.shape_env.bound_sympy(rows.node.expr)
    low = int(values.lower) if values.lower > 0 else 0
    high = int(values.upper) if values.upper < _NO_BOUND else None
    return low, high


def _hint(size: int | torch.SymInt) -> int:
    """The size in the call for which the graph was captured; reading it adds no guard.

    A size that depends on data has no hint and counts as 1.
    """
    if not isinstance(size, torch.SymInt):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)
