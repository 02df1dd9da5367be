"""Which rows of which expert each program of a grouped GEMM has, found on the device.

A block is up to BLOCK_M rows of one expert. The host does not know how many there are, only how
many there may be: the grid has that many, and those that are left over have no expert.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def load_offset(offsets_ptr, index, mask, M):
    """int32: offsets[index], kept within the rows there are; 0 before the first expert."""
    offset = tl.load(offsets_ptr + index, mask=mask, other=0)
    return tl.minimum(tl.maximum(offset, 0), M).to(tl.int32)


@triton.jit(do_not_specialize=["M", "experts", "num_blocks"])
def schedule_kernel(
    offsets_ptr,
    schedule_ptr,
    M,
    experts,
    num_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """schedule int32 [num_blocks, 3]: expert or -1, its first row, and the one after its last.

    offsets [experts]. BLOCK_E: experts filled up to a power of two. BLOCK: of blocks in a program.
    """
    e = tl.arange(0, BLOCK_E)
    # [BLOCK_E]
    end = load_offset(offsets_ptr, e, e < experts, M)
    # [BLOCK_E]
    start = load_offset(offsets_ptr, e - 1, (e > 0) & (e < experts), M)
    blocks = tl.maximum(tl.cdiv(end - start, BLOCK_M), 0)
    last = tl.cumsum(blocks, 0)  # one after the expert's last block

    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The experts that end before a block, empty ones too, are as many as its own number.
    before = last[None, :] <= block[:, None]
    expert = tl.sum(before.to(tl.int32), 1)
    ahead = tl.sum(tl.where(before, blocks[None, :], 0), 1)
    has_rows = expert < experts
    # [BLOCK]
    row = load_offset(offsets_ptr, expert - 1, has_rows & (expert > 0), M)
    row += (block - ahead) * BLOCK_M
    # [BLOCK]
    row_end = load_offset(offsets_ptr, expert, has_rows, M)
    mask = block < num_blocks
    entry = schedule_ptr + 3 * block
    tl.store(entry, tl.where(has_rows, expert, -1), mask=mask)
    tl.store(entry + 1, row, mask=mask)
    tl.store(entry + 2, tl.minimum(row + BLOCK_M, row_end), mask=mask)
