"""Calls whose tensors are all given by keyword: the passes read them, or leave them alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines the operator)
from torch import Tensor

from tests.passes.graphs import assert_same, run_passes

E, N, K, P = 5, 24, 40, 7
GENERATOR = torch.Generator().manual_seed(1)
STACK = torch.randn(E, N, K, generator=GENERATOR) / K**0.5
MATRIX = torch.randn(K, K, generator=GENERATOR) / K**0.5
ROUTER = torch.randn(E, K, generator=GENERATOR)
BIAS = torch.randn(E, N, generator=GENERATOR)
IDS, X = torch.tensor([3, 0, 3, 3, 1, 0, 2]), torch.randn(P, K)


def offsets_by_keyword(x: Tensor, ids: Tensor) -> Tensor:
    in_order = torch.sort(input=ids)[0]
    counts = torch.histc(input=in_order.float(), bins=E, min=0, max=E - 1)
    offsets = torch.cumsum(input=counts, dim=0, dtype=torch.int32)
    y = torch.ops.transformers.grouped_mm_fallback(x, STACK.mT, offs=offsets)
    return y + BIAS[in_order]


def multiplied_offsets(x: Tensor, ids: Tensor) -> Tensor:
    offsets = torch.mul(input=torch.ones(E, dtype=torch.int32), other=0)
    y = torch.ops.transformers.grouped_mm_fallback(x, STACK.mT, offs=offsets)
    return y + BIAS[ids]


PROGRAMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_select": lambda x, i: torch.bmm(
        torch.index_select(input=x[:, None], dim=2, index=i),
        torch.index_select(input=STACK[i], dim=1, index=i),
    ),
    "chunk": lambda x, i: torch.bmm(
        torch.chunk(input=STACK[i], chunks=2, dim=1)[0], x.unsqueeze(-1)
    ),
    "unsqueeze": lambda x, i: torch.bmm(STACK[i], torch.unsqueeze(input=x, dim=-1)),
    "reshape of x": lambda x, i: F.linear(torch.reshape(input=x, shape=(-1, K)), MATRIX).view(P, K),
    "reshape of y": lambda x, i: torch.reshape(input=F.linear(x, MATRIX), shape=(P, K)) + 0,
    "offsets": offsets_by_keyword,
    "argmax": lambda x, i: torch.bmm(
        STACK[torch.argmax(input=F.linear(x, ROUTER), dim=-1)], x.unsqueeze(-1)
    ),
    "mul": multiplied_offsets,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_keyword_arguments_do_not_stop_a_pass(name: str) -> None:
    program = PROGRAMS[name]
    run = run_passes(lambda x, i: program(x, i), X, IDS, granularity=16)
    assert_same(run)
