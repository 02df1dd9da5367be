"""Experts in one call of the x86 kernel: routing by offsets and by ids, against the oracle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.kernels.epilogue import ACTIVATIONS
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.cpu.test_stream import DTYPES, of_every_form, packed
from tests.kernels.test_op import oracle
from tests.kernels.test_op_experts import gathered, grouped
from tests.native.paths import NAMES, path
from tests.strategies import Problem, make_problem

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

stacks = of_every_form(
    {
        "n": st.sampled_from([1, 64, 70, 192]),
        "k": st.sampled_from([1, 40, 72, 256]),
        "group_size": st.sampled_from([5, 32, 4096]),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "gated": st.booleans(),
        "bias": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
        "strided": st.booleans(),
    }
)


def stack_of(experts: int, options: dict[str, Any], rows: int) -> tuple[list[Problem], list[Any]]:
    """A problem for each expert, all of the same x [rows, K], and the operators' arguments."""
    problems = [make_problem(leading=(rows,), seed=e, **options) for e in range(experts)]
    problems = [replace(p, x=problems[0].x) for p in problems]
    weights = [packed(p) for p in problems]
    first = problems[0]
    bias = None if first.bias is None else torch.stack([p.bias for p in problems])
    tensors = QuantizedTensor.stack(weights).tensors
    form = [
        first.bits,
        first.levels,
        weights[0].group_size,
        first.n,
        first.k,
        first.activation,
        first.gated,
    ]
    return problems, [*tensors, bias, *form, "x86_stream"]


def assert_rows_are_of(problems: list[Problem], got: Tensor, experts: list[int]) -> None:
    for row, expert in enumerate(experts):
        p = problems[expert]
        want, bound = oracle(replace(p, x=p.x[row : row + 1]))
        error = (got[row].double() - want[0]).abs()
        assert bool((error <= bound[0]).all()), f"row {row} of expert {expert}: {error.max():.3g}"


@given(
    name=st.sampled_from(NAMES),
    threads=st.sampled_from([1, 2]),
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 3, 9, 17]), min_size=1, max_size=6),
    beyond=st.sampled_from([0, 2]),
    index=st.sampled_from([torch.int32, torch.int64]),
    options=stacks,
)
def test_grouped(
    name: str,
    threads: int,
    counts: list[int],
    beyond: int,
    index: torch.dtype,
    options: dict[str, Any],
) -> None:
    problems, arguments = stack_of(len(counts), options, sum(counts) + beyond)
    offsets = torch.tensor(counts).cumsum(0).to(index)
    with path(name, threads):
        got = grouped(problems[0].x, arguments[0], arguments[1], offsets, *arguments[2:])
    assert_rows_are_of(problems, got, [e for e, count in enumerate(counts) for _ in range(count)])


@given(
    name=st.sampled_from(NAMES),
    threads=st.sampled_from([1, 2]),
    ids=st.lists(st.integers(-5, 4), min_size=1, max_size=24),
    index=st.sampled_from([torch.int32, torch.int64]),
    options=stacks,
)
def test_gathered(
    name: str, threads: int, ids: list[int], index: torch.dtype, options: dict[str, Any]
) -> None:
    problems, arguments = stack_of(5, options, len(ids))
    with path(name, threads):
        got = gathered(
            problems[0].x, *arguments[:2], torch.tensor(ids, dtype=index), *arguments[2:]
        )
    assert_rows_are_of(problems, got, [i % 5 for i in ids])


@pytest.mark.parametrize("ids", [[0, 5], [-6, 0]], ids=str)
def test_an_expert_that_there_is_not(ids: list[int]) -> None:
    problems, arguments = stack_of(5, {"n": 4, "k": 8}, 2)
    with path(NAMES[0]), pytest.raises(IndexError, match=r"the weight has 5 experts"):
        gathered(problems[0].x, *arguments[:2], torch.tensor(ids), *arguments[2:])


@pytest.mark.parametrize("ends", [[2, 1], [0, 5], [-1, 3]], ids=str)
def test_offsets_that_fall_or_pass_the_rows(ends: list[int]) -> None:
    problems, arguments = stack_of(2, {"n": 4, "k": 8}, 4)
    with path(NAMES[0]), pytest.raises(IndexError, match="offsets must rise from 0"):
        grouped(problems[0].x, *arguments[:2], torch.tensor(ends), *arguments[2:])


def test_experts_without_rows_are_not_read() -> None:
    """What is not read may as well be wrong: NaN scales."""
    problems, arguments = stack_of(4, {"n": 70, "k": 40, "dtype": torch.bfloat16}, 6)
    scale = arguments[1].clone()
    scale[[0, 3]] = torch.nan
    offsets = torch.tensor([0, 2, 4, 4])
    with path(NAMES[0]):
        got = grouped(problems[0].x, arguments[0], scale, offsets, *arguments[2:])
    assert_rows_are_of(problems, got[:4], [1, 1, 2, 2])


def test_offsets_need_more_than_32_bits(tmp_path: Path) -> None:
    """The last expert lies behind 2^31 words of codes, in a file of holes."""
    problems, (qweight, scale, *form) = stack_of(2, {"n": 64, "k": 4096}, rows=3)
    experts = 2**31 // qweight[0].numel() + 1
    codes = torch.from_file(
        str(tmp_path / "codes"), shared=True, size=experts * qweight[0].numel(), dtype=torch.int32
    )
    far, scales = (
        codes.view(experts, *qweight.shape[1:]),
        scale.new_zeros(experts, *scale.shape[1:]),
    )
    for many, two in ((far, qweight), (scales, scale)):
        many[0], many[-1] = two
    for name in NAMES:
        with path(name):
            got = gathered(problems[0].x, far, scales, torch.tensor([-1, 0, experts - 1]), *form)
        assert_rows_are_of(problems, got, [1, 0, 1])
