"""The blocks of grouped rows against counting them: every small case, and some large ones."""

from itertools import combinations_with_replacement, pairwise, product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from fqcompile.kernels.triton.expert_gemm import rows_of_block
from fqcompile.kernels.triton.launch import filled_up, most_blocks
from tests.kernels.triton.oracle import on_every_device, running


@triton.jit
def _blocks_kernel(offsets_ptr, out_ptr, M, experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    block = tl.program_id(0)
    expert, row, end = rows_of_block(offsets_ptr, block, M, experts, BLOCK_M, BLOCK_E)
    tl.store(out_ptr + 3 * block, expert)
    tl.store(out_ptr + 3 * block + 1, row)
    tl.store(out_ptr + 3 * block + 2, end)


def blocks_of(offsets: torch.Tensor, m: int, block_m: int) -> list[list[int]]:
    """Expert, first row and end of each block that the grid has."""
    experts = offsets.shape[0]
    out = torch.empty(most_blocks(m, experts, block_m), 3, dtype=torch.int32, device=offsets.device)
    _blocks_kernel[(len(out),)](offsets, out, m, experts, block_m, filled_up(experts))
    return out.tolist()


def counted(offsets: tuple[int, ...], block_m: int) -> list[list[int]]:
    return [
        [expert, row, min(row + block_m, end)]
        for expert, (start, end) in enumerate(pairwise((0, *offsets)))
        for row in range(start, end, block_m)
    ]


def check(
    offsets: tuple[int, ...], m: int, block_m: int, device: str, dtype: torch.dtype = torch.int32
) -> int:
    """The number of blocks with rows; the others come after them and have no expert."""
    with running(device):
        found = blocks_of(torch.tensor(offsets, dtype=dtype, device=device), m, block_m)
    want = counted(offsets, block_m)
    assert found[: len(want)] == want
    assert all(expert == len(offsets) for expert, _, _ in found[len(want) :])
    return len(want)


@on_every_device
@pytest.mark.parametrize(("experts", "most"), [(1, 9), (2, 6), (3, 5), (5, 2)])
def test_every_small_case(experts: int, most: int, device: str) -> None:
    """And the most blocks that are ever needed are all that there are."""
    needed: dict[tuple[int, int], int] = {}
    for offsets in combinations_with_replacement(range(most + 1), experts):
        for m, block_m in product({max(1, offsets[-1]), most}, (2, 4)):
            blocks = check(offsets, m, block_m, device)
            needed[m, block_m] = max(blocks, needed.get((m, block_m), 0))
    for (m, block_m), blocks in needed.items():
        assert blocks == most_blocks(m, experts, block_m)


@on_every_device
@pytest.mark.parametrize(
    ("experts", "dtype"), [(60, torch.int32), (128, torch.int64), (512, torch.int32)], ids=str
)
@pytest.mark.parametrize("mean", [0.02, 1, 20])
def test_many_experts(mean: float, experts: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(experts)
    rows = torch.rand(experts).pow(3).mul(4 * mean).round().int()
    rows[3::5] = 0
    rows[5] += 1
    offsets = tuple(rows.cumsum(0).tolist())
    check(offsets, offsets[-1], 16, device, dtype)
    check(offsets, offsets[-1] + 50, 128, device, dtype)
