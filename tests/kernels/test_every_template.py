"""Every template that runs on a CPU, a new one too: the fp64 oracle on each form that it takes."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from fqcompile.kernels.registry import TEMPLATES
from fqcompile.kernels.spec import GemmSpec
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.test_op import oracle
from tests.kernels.test_op_experts import Experts, gathered, grouped, make_experts
from tests.strategies import Problem, make_problem, matmul

ON_CPU = [name for name in TEMPLATES if not name.startswith("triton")]
SIZES = [(64, 128, 32), (64, 128, 128), (7, 48, 48), (5, 40, 32)]  # n, k, group size
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPILOGUES = [("none", False), ("silu", False), ("gelu", True)]
ROUTINGS = {"grouped": grouped, "gathered": gathered}


def spec_of(p: Problem, **more: Any) -> GemmSpec:
    return GemmSpec(
        m=p.x.shape[:-1].numel(),
        n=p.n,
        k=p.k,
        bits=p.bits,
        group_size=p.group_size,
        dtype=p.x.dtype,
        scale_dtype=p.scale.dtype,
        device_type="cpu",
        activation=p.activation,
        gated=p.gated,
        has_bias=p.bias is not None,
        has_residual=p.residual is not None,
        **more,
    )


def forms() -> Iterator[dict[str, Any]]:
    for (n, k, group), bits, dtype, (activation, gated) in product(
        SIZES, (4, 8), DTYPES, EPILOGUES
    ):
        sizes = {"n": n, "k": k, "group_size": group, "bits": bits, "dtype": dtype}
        yield {**sizes, "activation": activation, "gated": gated, "bias": n > 5}


def packed(template: str, p: Problem, *stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The weight in the template's layout; `stack` are codes and scales of several experts."""
    tensors = stack or (p.qweight, p.scale)
    form = Format(p.bits, p.group_size, p.qweight.shape[0], p.k, len(stack and stack[0]))
    return TEMPLATES[template].layout.pack(QuantizedTensor(*tensors, form)).tensors


def assert_near(got: torch.Tensor, p: Problem, what: object) -> None:
    want, bound = oracle(p)
    assert (got.shape, got.dtype) == (want.shape, p.x.dtype)
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"{what}: off by {error.max():.3g}"


@pytest.mark.parametrize("template", ON_CPU)
def test_one_matrix(template: str) -> None:
    shapes = product(forms(), ((1,), (2, 3), (70,)), (False, True))
    problems = [make_problem(leading=m, residual=r, **form) for form, m, r in shapes]
    taken = [p for p in problems if TEMPLATES[template].refuse(spec_of(p)) is None]
    if not taken:
        pytest.skip(f"refuses all: {TEMPLATES[template].refuse(spec_of(problems[0]))}")
    for p in taken:
        weight = packed(template, p)
        assert_near(matmul(p.x, *weight, *p.arguments[3:], template), p, spec_of(p))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("template", ON_CPU)
def test_experts(template: str, routing: Any) -> None:
    calls = [make_experts([0, 0, 2, 2, 2], 3, **form) for form in forms()]
    about = {"experts": 3, "routing": routing}
    taken = [
        c for c in calls if TEMPLATES[template].refuse(spec_of(rows_of(c, 2), **about)) is None
    ]
    if not taken:
        pytest.skip(f"refuses all: {TEMPLATES[template].refuse(spec_of(rows_of(calls[0], 2)))}")
    op = ROUTINGS[routing]
    for call in taken:
        codes, scale, bias, *form = call.arguments
        weight = packed(template, call.problems[0], codes, scale)
        y = op(call.x, *weight, call.routing(op), bias, *form, template)
        for expert in (0, 2):
            p = rows_of(call, expert)
            assert_near(y[call.of_row == expert], p, spec_of(p, **about))


def rows_of(call: Experts, expert: int) -> Problem:
    """What one expert computes."""
    problem = call.problems[expert]
    return Problem(**{**vars(problem), "x": call.x[call.of_row == expert]})
