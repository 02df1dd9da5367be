"""y[m, n] = act(Σ_g scale[g, n] Σ_(k in g) q[n, k] x[m, k] + bias[n]) + residual[m, n]

If gated, act(gate) * up(up) replaces act. `expert_gemm` has the same body with routed rows.

The weight is the left operand: the only one that wgmma can read from registers, and the one that
mma.sync can read in fragment order without a shuffle. Products use the codes, which fp16 and bf16
represent exactly; the scale of a group multiplies its fp32 sum, so a dot never crosses a group.

With SPLIT_K > 1 each program sums one share of K. Who adds the shares, in a fixed order, is either
a second kernel, `finish_kernel`, or the last program of each tile: it saves that kernel's launch.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl

from fqcompile.kernels.triton.conversion import code_factor
from fqcompile.kernels.triton.dependent_launch import wait_for_earlier_kernels
from fqcompile.kernels.triton.epilogue import store
from fqcompile.kernels.triton.fragments import (
    MICRO_ROWS,
    first_and_second_half,
    load_scales,
    load_words,
    operand,
    prefetch_weights,
    word_offsets,
)


@triton.jit
def _halves_of_scales(scales):
    ROWS: tl.constexpr = scales.shape[0]
    HALF: tl.constexpr = scales.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(scales, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _scaled_sum(acc, product, scales, GROUPED: tl.constexpr):
    """acc + scale of the group * product; without groups the scale is applied after the loop."""
    if GROUPED:
        total = tl.fma(product, tl.broadcast_to(scales.to(tl.float32), product.shape), acc)
    else:
        total = acc + product
    return total


@triton.jit
def _accumulate(
    acc,
    acc_up,
    words,
    words_up,
    scales,
    scales_up,
    x_ptrs,
    mask_m,
    K,
    k0,
    WIDTH: tl.constexpr,
    DOT_K: tl.constexpr,
    GROUPED: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    KWIDTH: tl.constexpr,
    CONVERSION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Add the columns k0 to k0 + WIDTH, with one dot per DOT_K columns: none crosses a group."""
    if WIDTH > DOT_K:
        HALF: tl.constexpr = WIDTH // 2
        w0, w1 = first_and_second_half(words, WIDTH, BITS, LEVELS)
        w0_up, w1_up = first_and_second_half(words_up, WIDTH, BITS, LEVELS)
        s0, s1 = _halves_of_scales(scales)
        s0_up, s1_up = _halves_of_scales(scales_up)
        acc, acc_up = _accumulate(
            acc, acc_up, w0, w0_up, s0, s0_up, x_ptrs, mask_m, K, k0,
            HALF, DOT_K, GROUPED, BITS, LEVELS, KWIDTH, CONVERSION, GATED, EVEN_K,
        )  # fmt: skip
        acc, acc_up = _accumulate(
            acc, acc_up, w1, w1_up, s1, s1_up, x_ptrs, mask_m, K, k0 + HALF,
            HALF, DOT_K, GROUPED, BITS, LEVELS, KWIDTH, CONVERSION, GATED, EVEN_K,
        )  # fmt: skip
    else:
        offs_k = k0 + tl.arange(0, WIDTH)
        mask = mask_m[None, :]
        if not EVEN_K:
            mask = mask & (offs_k < K)[:, None]
        # [WIDTH, BLOCK_M]
        x = tl.load(x_ptrs + offs_k[:, None], mask=mask, other=0.0)
        w = operand(words, WIDTH, BITS, LEVELS, KWIDTH, x.dtype, CONVERSION)
        acc = _scaled_sum(acc, tl.dot(w, x), scales, GROUPED)
        if GATED:
            w_up = operand(words_up, WIDTH, BITS, LEVELS, KWIDTH, x.dtype, CONVERSION)
            acc_up = _scaled_sum(acc_up, tl.dot(w_up, x), scales_up, GROUPED)
    return acc, acc_up


@triton.jit
def scaled_products(
    x_ptrs,
    mask_m,
    qweight_ptr,
    scale_ptr,
    offs_n,
    N,
    K,
    BLOCKS_PER_GROUP: tl.constexpr,
    DOT_K: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    KWIDTH: tl.constexpr,
    CONVERSION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """ŵ xᵀ [BLOCK_N, BLOCK_M] in fp32, and the same for up, over program_id(1)'s share of K.

    x_ptrs [1, BLOCK_M]: the rows of x. offs_n [BLOCK_N]: the rows of the weight; up's are + N.
    """
    rows = N * 2 if GATED else N
    num_blocks = tl.cdiv(K, BLOCK_K)
    WORDS: tl.constexpr = BLOCK_K * BITS // 32
    DOTS: tl.constexpr = BLOCK_K // DOT_K
    GROUPED: tl.constexpr = BLOCKS_PER_GROUP > 0
    q_ptrs = qweight_ptr + word_offsets(offs_n, rows, num_blocks, WORDS)
    q_up_ptrs = qweight_ptr + word_offsets(offs_n + N, rows, num_blocks, WORDS)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_up = acc
    scales = load_scales(scale_ptr, offs_n, rows, 0, BLOCK_N, DOTS)
    scales_up = scales
    if GATED:
        scales_up = load_scales(scale_ptr, offs_n + N, rows, 0, BLOCK_N, DOTS)
    per_share = tl.cdiv(num_blocks, SPLIT_K)
    first = tl.program_id(1) * per_share
    for block in range(first, tl.minimum(first + per_share, num_blocks)):
        words = load_words(q_ptrs + block * (MICRO_ROWS * WORDS), BLOCK_N, BITS)
        words_up = words
        if GATED:
            words_up = load_words(q_up_ptrs + block * (MICRO_ROWS * WORDS), BLOCK_N, BITS)
        if GROUPED:
            group = block // BLOCKS_PER_GROUP
            scales = load_scales(scale_ptr, offs_n, rows, group, BLOCK_N, DOTS)
            scales_up = scales
            if GATED:
                scales_up = load_scales(scale_ptr, offs_n + N, rows, group, BLOCK_N, DOTS)
        acc, acc_up = _accumulate(
            acc, acc_up, words, words_up, scales, scales_up, x_ptrs, mask_m, K, block * BLOCK_K,
            BLOCK_K, DOT_K, GROUPED, BITS, LEVELS, KWIDTH, CONVERSION, GATED, EVEN_K,
        )  # fmt: skip

    FACTOR: tl.constexpr = code_factor(x_ptrs.dtype.element_ty, LEVELS, CONVERSION)
    acc *= FACTOR
    acc_up *= FACTOR
    if not GROUPED:
        acc *= scales.to(tl.float32)
        acc_up *= scales_up.to(tl.float32)
    return acc, acc_up


@triton.jit
def _prefetch(
    qweight_ptr,
    scale_ptr,
    row,
    N,
    K,
    BLOCKS_PER_GROUP: tl.constexpr,
    DOTS: tl.constexpr,
    BITS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """The first codes and scales that `scaled_products` loads, up's too."""
    rows = N * 2 if GATED else N
    num_blocks = tl.cdiv(K, BLOCK_K)
    first = tl.program_id(1) * tl.cdiv(num_blocks, SPLIT_K)
    for half in tl.static_range(2 if GATED else 1):
        prefetch_weights(
            qweight_ptr, scale_ptr, row + half * N, rows, first, num_blocks,
            BLOCKS_PER_GROUP, DOTS, BITS, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr,
    qweight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    shares_ptr,
    arrivals_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_rm,
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
    """y [M, N], or with SPLIT_K > 1 shares [SPLIT_K, M, N] in fp32, before the epilogue.

    arrivals: a counter for each tile, 0 before and after; then `store` makes y [M, N] of shares.
    BLOCKS_PER_GROUP: blocks of K that share their scales, 0 where there is one scale per row.
    DOT_K: columns of K in one dot.
    """
    # Neighboring programs read the same weight tile: L2 serves it to all but the first.
    num_pid_m = tl.cdiv(M, BLOCK_M)
    if PDL:
        _prefetch(
            qweight_ptr, scale_ptr, (tl.program_id(0) // num_pid_m) * BLOCK_N, N, K,
            BLOCKS_PER_GROUP, BLOCK_K // DOT_K, BITS, GATED, BLOCK_N, BLOCK_K, SPLIT_K,
        )  # fmt: skip
    wait_for_earlier_kernels(PDL)
    offs_m = (tl.program_id(0) % num_pid_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // num_pid_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm
    acc, acc_up = scaled_products(
        x_ptrs, mask_m, qweight_ptr, scale_ptr, offs_n, N, K,
        BLOCKS_PER_GROUP, DOT_K, BITS, LEVELS, KWIDTH, CONVERSION, GATED, EVEN_K,
        BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
    )  # fmt: skip
    mask = (offs_n < N)[:, None] & mask_m[None, :]
    store(
        acc, acc_up, bias_ptr, residual_ptr, y_ptr, shares_ptr, arrivals_ptr, offs_m, offs_n, mask,
        M, N, stride_rm, ACTIVATION, UP, GATED, SPLIT_K,
    )  # fmt: skip
