"""y[m, n] = act(Σ_k ŵ[e(m), n, k] x[m, k] + bias[e(m), n]): the GEMM with an expert for each row.

grouped    a program has a block of up to BLOCK_M rows of one expert, which it finds in the offsets.
           The host knows only the largest possible number of such blocks: the grid has that many,
           and superfluous blocks have no expert
gathered   a program has one row, whose id names its expert; rows need not be sorted

A stack holds the packed weights of its experts one after the other.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl

from fqcompile.kernels.triton.dependent_launch import wait_for_earlier_kernels
from fqcompile.kernels.triton.epilogue import finish_row, store
from fqcompile.kernels.triton.fragments import scales_of_an_expert, words_of_an_expert
from fqcompile.kernels.triton.gemm import scaled_products


@triton.jit
def load_offset(offsets_ptr, index, mask, M):
    """int32: offsets[index] clamped to 0 .. M; 0 where masked, as before the first expert."""
    offset = tl.load(offsets_ptr + index, mask=mask, other=0)
    return tl.minimum(tl.maximum(offset, 0), M).to(tl.int32)


@triton.jit
def rows_of_block(
    offsets_ptr, block, M, experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """(expert, or `experts` where the block has none; its first row, and the end of its rows).

    offsets [experts]. BLOCK_E: experts rounded up to a power of two.
    """
    e = tl.arange(0, BLOCK_E)
    # [BLOCK_E]
    end = load_offset(offsets_ptr, e, e < experts, M)
    # [BLOCK_E]
    start = load_offset(offsets_ptr, e - 1, (e > 0) & (e < experts), M)
    blocks = tl.maximum(tl.cdiv(end - start, BLOCK_M), 0)
    # The expert is the number of those, without rows too, whose blocks end before this one.
    before = tl.cumsum(blocks, 0) <= block
    expert = tl.minimum(tl.sum(before.to(tl.int32), 0), experts)
    ahead = tl.sum(tl.where(before, blocks, 0), 0)
    row = load_offset(offsets_ptr, expert - 1, (expert > 0) & (expert < experts), M)
    row += (block - ahead) * BLOCK_M
    row_end = load_offset(offsets_ptr, expert, expert < experts, M)
    return expert, row, tl.minimum(row + BLOCK_M, row_end)


@triton.jit
def expert_of_id(ids_ptr, m, experts):
    """(expert, whether it exists); a negative id counts from the last expert."""
    index = tl.load(ids_ptr + m).to(tl.int64)
    expert = tl.where(index < 0, index + experts, index)
    known = (expert >= 0) & (expert < experts)
    return tl.where(known, expert, 0), known


@triton.jit(do_not_specialize=["M", "experts", "num_blocks"])
def expert_gemm_kernel(
    x_ptr,
    qweight_ptr,
    scale_ptr,
    routing_ptr,
    bias_ptr,
    y_ptr,
    shares_ptr,
    arrivals_ptr,
    M,
    N,
    K,
    experts,
    num_blocks,
    stride_xm,
    GROUPED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCKS_PER_GROUP: tl.constexpr,
    DOT_K: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    KWIDTH: tl.constexpr,
    CONVERSION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UP: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """y [M, N], or its split-K shares, as in `gemm_kernel`; blocks without an expert write nothing.

    routing: offsets [experts], or ids [M] with num_blocks = M. A row whose id names no expert
    becomes NaN. BLOCK_E: experts rounded up to a power of two.
    """
    # Which weights a program reads, an earlier kernel says: there is nothing to prefetch.
    wait_for_earlier_kernels(PDL)
    # Neighboring programs may read the same weight tile, as blocks of one expert do.
    block = tl.program_id(0) % num_blocks
    offs_n = (tl.program_id(0) // num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_M)
    if GROUPED:
        expert, first, end = rows_of_block(routing_ptr, block, M, experts, BLOCK_M, BLOCK_E)
        if expert >= experts:
            return
        expert = expert.to(tl.int64)
        offs_m = first + lanes
        mask_m = offs_m < end
    else:
        expert, known = expert_of_id(routing_ptr, block, experts)
        offs_m = block + lanes
        mask_m = lanes == 0
    rows = N * 2 if GATED else N
    qweight_ptr += expert * words_of_an_expert(rows, K, BITS, BLOCK_K)
    scale_ptr += expert * scales_of_an_expert(rows, K, BLOCKS_PER_GROUP, DOT_K, BLOCK_K)
    if bias_ptr is not None:
        bias_ptr += expert * rows
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm
    acc, acc_up = scaled_products(
        x_ptrs, mask_m, qweight_ptr, scale_ptr, offs_n, N, K,
        BLOCKS_PER_GROUP, DOT_K, BITS, LEVELS, KWIDTH, CONVERSION, GATED, EVEN_K,
        BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
    )  # fmt: skip
    if not GROUPED:
        acc = tl.where(known, acc, float("nan"))
    mask = (offs_n < N)[:, None] & mask_m[None, :]
    store(
        acc, acc_up, bias_ptr, None, y_ptr, shares_ptr, arrivals_ptr, offs_m, offs_n, mask, M, N, 0,
        ACTIVATION, UP, GATED, SPLIT_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "experts"])
def finish_experts_kernel(
    shares_ptr,
    routing_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    experts,
    GROUPED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UP: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """y [M, N] from shares, as in `finish_kernel`; grouped rows without an expert are skipped.

    routing: offsets [experts] or ids [M]. BLOCK_E: experts rounded up to a power of two.
    """
    wait_for_earlier_kernels(PDL)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // num_pid_n).to(tl.int64)
    offs_n = (tl.program_id(0) % num_pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GROUPED:
        e = tl.arange(0, BLOCK_E)
        # [BLOCK_E]
        ends = tl.load(routing_ptr + e, mask=e < experts, other=M)
        expert = tl.sum((ends <= m).to(tl.int32), 0).to(tl.int64)  # padding ends after m
        if expert >= experts:
            return
    else:
        expert, _ = expert_of_id(routing_ptr, m, experts)
    if bias_ptr is not None:
        bias_ptr += expert * (2 * N if GATED else N)
    finish_row(
        shares_ptr, bias_ptr, None, y_ptr, m, offs_n, M, N, 0,
        ACTIVATION, UP, GATED, SPLIT_K, BLOCK_N,
    )  # fmt: skip
