"""Infinities and NaN in x reach the results as in eager: as in ŵ in fp32, then its matmul."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import TEMPLATES
from fqcompile.tensor.format import QTYPES, UNIFORM, Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.test_op import oracle, unpacked
from tests.native.paths import NAMES, path
from tests.strategies import Problem, make_problem, matmul

FORMS = [{"bits": qtype.bits, "levels": qtype.levels} for qtype in QTYPES.values()]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# (n, k, group): tails of K and of N, one scale a column, groups that end within a word, two blocks
SHAPES = [(128, 64, 32), (70, 37, 37), (70, 48, 5), (64, 600, 600), (64, 128, 128)]
Where = Callable[[], AbstractContextManager[None]]
# Each kernel: its template, and within what it runs.
KERNELS: dict[str, tuple[str, Where]] = {
    "dequantize": ("dequantize", nullcontext),
    "aten_int4pack": ("aten_int4pack", nullcontext),
    "aten_int8pack": ("aten_int8pack", nullcontext),
} | {f"x86_stream on {name}": ("x86_stream", partial(path, name)) for name in NAMES}


def kinds(y: Tensor) -> Tensor:
    """0 for a finite number, 1 for NaN, 2 and 3 for the infinities."""
    return y.isnan() + 2 * (y == math.inf) + 3 * (y == -math.inf)


def takes(template: str, p: Problem) -> bool:
    if not template.startswith("aten"):
        return True
    n, k, group = p.n, p.k, p.group_size
    of_int8 = p.bits == 8 and group >= k and k % 16 == 0
    uniform = p.levels == UNIFORM
    of_int4 = p.bits == 4 and uniform and n % 64 == 0 and group in (32, 64, 128) and k % group == 0
    return p.x.dtype == BF16 and (of_int8 if template.endswith("8pack") else of_int4)


def run(template: str, p: Problem) -> Tensor:
    rows = p.qweight.shape[0]
    form = Format(p.bits, p.group_size, rows, p.k, levels=p.levels)
    plain = QuantizedTensor(p.qweight, p.scale, form)
    return matmul(p.x, *TEMPLATES[template].layout.pack(plain).tensors, *p.arguments[3:], template)


def eager(p: Problem) -> Tensor:
    w_hat = unpacked(p.qweight, p.scale, p.bits, p.levels, p.group_size, p.k).float()
    z = p.x.float() @ w_hat.t()
    return Epilogue(p.bias, p.residual, p.activation, p.gated).apply(z).to(p.x.dtype)


def with_values(p: Problem, *values: float) -> Problem:
    """Row r has values[r % ...] once, in turn in the first and the last columns and in between."""
    x = p.x.clone()
    for row in range(len(x)):
        x[row, (row * 7 - 1) % p.k] = values[row % len(values)]
    return replace(p, x=x)


def both_infinities(p: Problem) -> Problem:
    x = p.x.clone()
    x[:, 1 % p.k], x[:, -1] = math.inf, -math.inf
    return replace(p, x=x)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 11])
def test_results_are_infinite_and_nan_as_in_eager(
    m: int, form: dict[str, Any], dtype: torch.dtype, name: str
) -> None:
    # Not gelu: PyTorch's own makes NaN of infinity for fp32 and bf16, and for fp16 does not.
    forms = [("none", False), ("relu", False), ("gelu_tanh", True), ("silu", False)]
    template, where = KERNELS[name]
    with where():
        for n, k, group in SHAPES:
            for activation, gated in [*forms, ("swiglu_oai", True)]:
                p = make_problem(
                    leading=(m,), n=n, k=k, **form, group_size=group, dtype=dtype,
                    activation=activation, gated=gated,
                )  # fmt: skip
                signs = with_values(p, math.inf, -math.inf), with_values(p, -math.inf, math.inf)
                drawn = (*signs, with_values(p, math.nan), both_infinities(p))
                for each in filter(partial(takes, template), drawn):
                    assert torch.equal(kinds(run(template, each)), kinds(eager(each)))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 8])
def test_large_numbers_are_not_made_infinite(
    m: int, form: dict[str, Any], dtype: torch.dtype, name: str
) -> None:
    """Their products with codes are, and those with the weight are not."""
    template, where = KERNELS[name]
    largest = torch.finfo(dtype).max
    with where():
        for n, k, group in SHAPES:
            p = make_problem(leading=(m,), n=n, k=k, **form, group_size=group, dtype=dtype)
            p = with_values(p, largest, -largest)
            if takes(template, p):
                want, bound = oracle(p)
                got = run(template, p)
                assert bool(got.isfinite().all())
                assert bool(((got.double() - want).abs() <= bound).all())


def test_other_rows_of_a_tile_keep_their_values() -> None:
    for form in FORMS:
        p = make_problem(leading=(8,), n=70, k=64, **form, dtype=BF16)
        x = p.x.clone()
        x[3, 5] = math.inf
        y = run("x86_stream" if NAMES else "dequantize", replace(p, x=x))
        want, bound = oracle(p)
        rest = [row for row in range(8) if row != 3]
        assert bool(((y.double() - want).abs() <= bound)[rest].all())
        assert not bool(y[3].isfinite().any())
