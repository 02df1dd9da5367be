"""Writes around experts: what a program reads before a write must not be read after it instead."""

from collections.abc import Callable

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (defines the operator)
from torch import Tensor

from fqcompile.passes.op_nodes import argument
from tests.passes.graphs import assert_same, run_passes

E, N, K, P = 5, 24, 40, 7
STACK = torch.randn(E, N, K, generator=torch.Generator().manual_seed(1)) / K**0.5
BIAS = torch.randn(E, N, generator=torch.Generator().manual_seed(2))
IDS, X = torch.tensor([3, 0, 3, 3, 1, 0, 2]), torch.randn(P, K)


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)


def scaled_after_gather(x: Tensor, ids: Tensor) -> Tensor:
    w = STACK[ids]
    w.mul_(2)
    return product(x, w)


def part_written_after_gather(x: Tensor, ids: Tensor) -> Tensor:
    w = STACK[ids]
    w[:, :3].zero_()
    return product(x, w)


def written_before_a_copy(x: Tensor, ids: Tensor) -> Tensor:
    w = STACK[ids].mT
    w.mul_(2)
    return (x[:, None] @ w.contiguous())[:, 0]


def ids_written_after_gather(x: Tensor, ids: Tensor) -> Tensor:
    w = STACK[ids]
    ids.add_(1).remainder_(E)
    return product(x, w)


GATHERS = [
    scaled_after_gather,
    part_written_after_gather,
    written_before_a_copy,
    ids_written_after_gather,
]


@pytest.mark.parametrize("forward", GATHERS, ids=lambda f: f.__name__)
def test_write_between_gather_and_product_keeps_the_product(
    forward: Callable[[Tensor, Tensor], Tensor],
) -> None:
    run = run_passes(lambda x, i: forward(x, i.clone()), X, IDS, granularity=16)
    assert run.ops["fq"] == 0
    assert_same(run)


def test_ids_written_before_the_gather_name_the_experts_that_the_op_reads() -> None:
    """Expert parallelism clamps ids in place first."""

    def forward(x: Tensor, ids: Tensor) -> Tensor:
        own = ids.clone()
        own.clamp_(max=2)
        return product(x, STACK[own])

    run = run_passes(forward, X, IDS, granularity=16)
    assert run.ops["fq"] == 1
    assert_same(run)


def with_offsets(x: Tensor, ids: Tensor, change: Callable[[Tensor, Tensor], object]) -> Tensor:
    """`change` of the counts and the offsets; the operator of transformers runs in fp32 too."""
    in_order, _ = torch.sort(ids)
    counts = torch.histc(in_order.float(), bins=E, min=0, max=E - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    change(counts, offsets)
    y = torch.ops.transformers.grouped_mm_fallback(x, STACK.mT, offs=offsets)
    return y + BIAS[in_order]


def term_scaled(x: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    term = bias[ids]
    term.mul_(2)
    return product(x, STACK[ids]) + term


def biases_scaled_after_they_were_picked(x: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    term = bias[ids]
    bias.mul_(2)
    return product(x, STACK[ids]) + term


def term_scaled_before_a_copy(x: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    term = bias[ids]
    term.mul_(2)
    return product(x, STACK[ids]) + term.mT.reshape(N * P).view(N, P).mT


def offsets_changed(x: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    return with_offsets(x, ids, lambda counts, offsets: offsets[0].fill_(0))


BIASES = [
    term_scaled,
    biases_scaled_after_they_were_picked,
    term_scaled_before_a_copy,
    offsets_changed,
]


@pytest.mark.parametrize("forward", BIASES, ids=lambda f: f.__name__)
def test_bias_that_is_written_to_stays_outside(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    run = run_passes(lambda x, i, b: forward(x, i, b.clone()), X, IDS, BIAS, granularity=16)
    (op,) = run.linears
    assert argument(op, "bias") is None
    assert_same(run)


def test_unwritten_counts_let_the_bias_in() -> None:
    run = run_passes(lambda x, i: with_offsets(x, i, lambda c, o: None), X, IDS, granularity=16)
    assert argument(run.linears[0], "bias") is not None
    assert_same(run)


def test_rows_written_between_two_projections_are_arranged_again() -> None:
    """x is repeated for each of a token's experts, which copies it."""

    def forward(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        own = x.clone()
        first = torch.einsum("tk,tank->tan", own, STACK[ids])
        own.mul_(2)
        return first, torch.einsum("tk,tank->tan", own, STACK[ids])

    run = run_passes(forward, X[:3], IDS[:6].view(3, 2), granularity=16)
    assert (run.ops["fq"], run.ops["expand"]) == (2, 2)
    assert_same(run)
