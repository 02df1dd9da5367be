"""Sizes and layouts around experts that are easy to take for others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fqcompile.passes.op_nodes import argument
from tests.passes.graphs import assert_same, run_passes

E, N, K, P = 5, 24, 40, 7
STACK = torch.randn(E, N, K, generator=torch.Generator().manual_seed(1)) / K**0.5
BIAS = torch.randn(E, N, generator=torch.Generator().manual_seed(2))
IDS, X = torch.tensor([3, 0, 3, 3, 1, 0, 2]), torch.randn(P, K)
CAPACITY = torch.randn(E, 4, K)


def gshard(x: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("egcm,ehm->egch", x, STACK) + bias


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bias_of_as_many_groups_as_experts_is_no_bias_of_experts(dynamic: bool) -> None:
    """[E, 1, N] beside [E, G, C, N] is a bias of each group."""
    x = torch.randn(E, E, 3, K)
    run = run_passes(lambda x: gshard(x, BIAS[:, None]), x, dynamic=dynamic, granularity=16)
    assert argument(run.linears[0], "bias") is None
    assert_same(run)


def test_bias_of_experts_beside_groups_is_fused() -> None:
    x = torch.randn(E, E, 3, K)
    run = run_passes(lambda x: gshard(x, BIAS[:, None, None]), x, granularity=16)
    assert argument(run.linears[0], "bias") is not None
    assert_same(run)


ONE_ID: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "matmul": (lambda x, i: x @ STACK[i].mT, torch.randn(P, 3, K)),
    "einsum": (lambda x, i: torch.einsum("pk,pnk->pn", x, STACK[i]), X),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ONE_ID)
def test_single_id_that_is_broadcast_over_rows(name: str, dynamic: bool) -> None:
    forward, x = ONE_ID[name]
    run = run_passes(lambda x, i: forward(x, i), x, IDS[:1], dynamic=dynamic, granularity=16)
    assert_same(run)


LAYOUTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "every expert": (lambda x: torch.einsum("eck,enk->nce", x, STACK), (CAPACITY,)),
    "picked": (lambda x, i: torch.einsum("pck,pnk->ncp", x, STACK[i]), (torch.randn(P, 4, K), IDS)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_result_has_the_layout_that_views_of_it_rely_on(name: str, dynamic: bool) -> None:
    """einsum leaves its result permuted in memory, here [last, first, middle]."""
    forward, args = LAYOUTS[name]

    def viewed(*args: Tensor) -> tuple[Tensor, Tensor]:
        y = forward(*args)
        return y, y.permute(2, 0, 1).view(-1)

    run = run_passes(viewed, *args, dynamic=dynamic, granularity=16)
    assert run.ops["fq"] == 1
    assert_same(run)


def test_experts_picked_on_another_device_are_kept() -> None:
    """Offloaded experts: the packed ones would lie where the stack does, apart from x."""
    x = torch.empty(P, 1, K, device="meta")
    run = run_passes(lambda x, i: torch.bmm(x, STACK[i].to("meta").mT), x, IDS, until="match")
    assert run.state.sites == []


def test_columns_picked_by_ids_are_no_biases_of_rows() -> None:
    """Of as many experts as rows and columns, every shape is that of a bias."""
    n = 6
    stack, bias, ids = torch.randn(n, n, K) / K**0.5, torch.randn(n, n), torch.randperm(n)

    def forward(x: Tensor, i: Tensor) -> Tensor:
        return torch.bmm(stack[i], x.unsqueeze(-1)).squeeze(-1) + bias.index_select(1, i)

    run = run_passes(forward, torch.randn(n, K), ids, granularity=16)
    assert argument(run.linears[0], "bias") is None
    assert_same(run)


INDICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "[i, :]": lambda w, i: w[i, :],
    "[i, ...]": lambda w, i: w[i, ...],
    "[i,]": lambda w, i: w[i,],
}


@pytest.mark.parametrize("name", INDICES)
def test_index_that_picks_whole_rows(name: str) -> None:
    pick = INDICES[name]

    def forward(x: Tensor, i: Tensor) -> Tensor:
        return torch.bmm(pick(STACK, i), x.unsqueeze(-1)).squeeze(-1) + pick(BIAS, i)

    run = run_passes(forward, X, IDS, granularity=16)
    assert argument(run.linears[0], "bias") is not None
    assert_same(run)


def test_index_of_part_of_the_rows_is_left_alone() -> None:
    run = run_passes(lambda x, i: torch.bmm(x[:, None, :9], STACK[i, :, :9].mT), X, IDS)
    assert run.ops["fq"] == 0
    assert_same(run)


def test_second_chunk_of_gathered_rows_is_the_second_half_of_the_stack() -> None:
    def forward(x: Tensor, i: Tensor) -> Tensor:
        return torch.einsum("pk,pnk->pn", x, STACK[i].chunk(2, dim=1)[1])

    run = run_passes(forward, X, IDS, granularity=16)
    assert run.ops["fq"] == 1
    assert_same(run)
