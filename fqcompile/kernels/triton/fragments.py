"""From packed words in memory to the weight operand of a dot, or to the weight itself.

`join`, `reshape` and `permute` in this order are what the compiler folds into a renaming of
registers; other spellings send the weight through shared memory.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl

from fqcompile.kernels.triton import layout
from fqcompile.kernels.triton.conversion import (
    code_factor,
    first_bytes,
    normal_levels,
    second_bytes,
    uniform_levels,
)
from fqcompile.kernels.triton.dependent_launch import prefetch

MICRO_ROWS = tl.constexpr(layout.MICRO_ROWS)
SCALE_ROWS = tl.constexpr(layout.SCALE_ROWS)


@triton.jit
def word_offsets(offs_n, rows, num_blocks, WORDS: tl.constexpr):
    """int32 [BLOCK_N, WORDS] into a K block's words; rows past the end read the last one."""
    row = tl.minimum(offs_n, rows - 1)
    start = (row // MICRO_ROWS) * (num_blocks * (MICRO_ROWS * WORDS)) + (row % MICRO_ROWS) * WORDS
    return start[:, None] + tl.arange(0, WORDS)[None, :]


@triton.jit
def load_words(ptrs, BLOCK_N: tl.constexpr, BITS: tl.constexpr):
    """[BLOCK_N, 4, chunks]: the words that one thread of an mma reads are neighbors."""
    words = tl.load(ptrs)
    if BITS == 4:
        chunks = tl.reshape(words, (BLOCK_N, 4, 4))
    else:
        blocks = tl.reshape(words, (BLOCK_N, 2, 4, 4))
        chunks = tl.reshape(tl.permute(blocks, (0, 2, 1, 3)), (BLOCK_N, 4, 8))
    return chunks


@triton.jit
def load_scales(scale_ptr, offs_n, rows, group, BLOCK_N: tl.constexpr, DOTS: tl.constexpr):
    """[BLOCK_N, DOTS]. Rows of scales are filled up to whole tiles, so there is no mask."""
    start = scale_ptr + group * (tl.cdiv(rows, SCALE_ROWS) * SCALE_ROWS * DOTS)
    return tl.load(start + offs_n[:, None] * DOTS + tl.arange(0, DOTS)[None, :])


@triton.jit
def prefetch_weights(
    qweight_ptr,
    scale_ptr,
    row,
    rows,
    first,
    num_blocks,
    BLOCKS_PER_GROUP: tl.constexpr,
    DOTS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of the rows `row` to row + BLOCK_N the blocks of K from `first` on: what a loop loads first.

    Four of them, 16 KiB of 4-bit codes for 64 rows: two such programs have an SM's share under way.
    row: a multiple of MICRO_ROWS. With fewer blocks left, codes of the rows after; none beyond the
    end. One bound for all of them leaves the compiler's loop as it is without prefetch.
    """
    # Not globals: at every launch Triton looks whether those that a kernel uses have changed.
    PREFETCHED: tl.constexpr = 4
    LINE: tl.constexpr = 128  # bytes
    WORDS: tl.constexpr = MICRO_ROWS * BLOCK_K * BITS // 32  # of a micro-tile
    LINE_WORDS: tl.constexpr = LINE // 4
    of_rows = row // MICRO_ROWS + tl.arange(0, BLOCK_N // MICRO_ROWS)
    lines = first * WORDS + tl.arange(0, PREFETCHED * WORDS // LINE_WORDS) * LINE_WORDS
    words = of_rows[:, None] * (num_blocks * WORDS) + lines[None, :]
    last = tl.cdiv(rows, MICRO_ROWS) * (num_blocks * WORDS) - 1
    prefetch(qweight_ptr + tl.minimum(words, last))
    SCALES: tl.constexpr = BLOCK_N * DOTS
    LINE_SCALES: tl.constexpr = LINE * 8 // scale_ptr.dtype.element_ty.primitive_bitwidth
    columns = row * DOTS + tl.arange(0, SCALES // LINE_SCALES) * LINE_SCALES
    GROUPED: tl.constexpr = BLOCKS_PER_GROUP > 0
    groups = tl.arange(0, PREFETCHED if GROUPED else 1)
    if GROUPED:
        groups = tl.minimum(first + groups, num_blocks - 1) // BLOCKS_PER_GROUP
    groups *= tl.cdiv(rows, SCALE_ROWS) * SCALE_ROWS * DOTS
    prefetch(scale_ptr + groups[:, None] + columns[None, :])


@triton.jit
def words_of_an_expert(rows, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """int64, so that the product with an expert may be beyond 2^31."""
    WORDS: tl.constexpr = BLOCK_K * BITS // 32
    micro_tiles = tl.cdiv(rows, MICRO_ROWS) * tl.cdiv(K, BLOCK_K)
    return micro_tiles.to(tl.int64) * (MICRO_ROWS * WORDS)


@triton.jit
def scales_of_an_expert(
    rows, K, BLOCKS_PER_GROUP: tl.constexpr, DOT_K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """int64: groups or blocks of K, times rows, times dots."""
    groups = tl.cdiv(tl.cdiv(K, BLOCK_K), BLOCKS_PER_GROUP) if BLOCKS_PER_GROUP > 0 else 1
    tiles = groups * tl.cdiv(rows, SCALE_ROWS)
    return tiles.to(tl.int64) * (SCALE_ROWS * (BLOCK_K // DOT_K))


@triton.jit
def operand(
    words,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    KWIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
):
    """[rows, WIDTH] in DTYPE, level / code_factor, from words [rows, 4, chunks]."""
    ROWS: tl.constexpr = words.shape[0]
    CHUNKS: tl.constexpr = words.shape[2]
    if LEVELS != "uniform":
        tl.static_assert(LEVELS == "normal")
        tl.static_assert(BITS == 4)
    if BITS == 4:
        places = words & 0x77777777
        if LEVELS == "normal":
            w = normal_levels(places, words, DTYPE, CONVERSION)
        else:
            w = uniform_levels(words, DTYPE, CONVERSION)
        if WIDTH == 16:
            w = tl.reshape(w, (ROWS, 4, CHUNKS, 2, 2, 1))
        elif LEVELS == "normal":
            w = tl.join(w, normal_levels(places >> 16, words << 4, DTYPE, CONVERSION))
        else:
            w = tl.join(w, uniform_levels(words >> 8, DTYPE, CONVERSION))
        # dimensions n, t, c, p, h, rep -> n, c, rep, place(t, h, p)
        if KWIDTH == 2:
            w = tl.permute(w, (0, 2, 5, 4, 1, 3))
        else:
            w = tl.permute(w, (0, 2, 5, 1, 4, 3))
    else:
        w = tl.join(
            first_bytes(words, DTYPE, CONVERSION),
            first_bytes(second_bytes(words, CONVERSION), DTYPE, CONVERSION),
        )
        # dimensions n, t, c, p, h -> n, c, place(t, h, p)
        if KWIDTH == 2:
            w = tl.permute(w, (0, 2, 4, 1, 3))
        else:
            w = tl.permute(w, (0, 2, 1, 4, 3))
    return tl.reshape(w, (ROWS, WIDTH))


@triton.jit
def first_and_second_half(words, WIDTH: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """The words of the first WIDTH / 2 columns, and of the others."""
    if BITS == 4 and WIDTH == 32:
        first = words
        if LEVELS == "normal":
            second = ((words >> 16) & 0x7777) | ((words << 4) & ~0x7777)
        else:
            second = words >> 8
    else:
        ROWS: tl.constexpr = words.shape[0]
        CHUNKS: tl.constexpr = words.shape[2]
        pairs = tl.reshape(words, (ROWS, 4, 2, CHUNKS // 2))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return first, second


@triton.jit
def dequantize_kernel(
    qweight_ptr,
    scale_ptr,
    w_ptr,
    rows,
    K,
    STACK: tl.constexpr,
    BLOCKS_PER_GROUP: tl.constexpr,
    DOT_K: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    KWIDTH: tl.constexpr,
    CONVERSION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w [rows, K], or of a stack expert program_id(1); the format as in `gemm_kernel`."""
    num_blocks = tl.cdiv(K, BLOCK_K)
    if STACK:
        expert = tl.program_id(1).to(tl.int64)
        qweight_ptr += expert * words_of_an_expert(rows, K, BITS, BLOCK_K)
        scale_ptr += expert * scales_of_an_expert(rows, K, BLOCKS_PER_GROUP, DOT_K, BLOCK_K)
        w_ptr += expert * rows * K
    block = tl.program_id(0) % num_blocks
    offs_n = (tl.program_id(0) // num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    WORDS: tl.constexpr = BLOCK_K * BITS // 32
    DOTS: tl.constexpr = BLOCK_K // DOT_K
    q_ptrs = qweight_ptr + word_offsets(offs_n, rows, num_blocks, WORDS)
    words = load_words(q_ptrs + block * (MICRO_ROWS * WORDS), BLOCK_N, BITS)
    # fp16 holds every code exactly, whatever the output is.
    codes = operand(words, BLOCK_K, BITS, LEVELS, KWIDTH, tl.float16, CONVERSION).to(tl.float32)
    group = block // BLOCKS_PER_GROUP if BLOCKS_PER_GROUP > 0 else 0
    scales = load_scales(scale_ptr, offs_n, rows, group, BLOCK_N, DOTS).to(tl.float32)
    scales = tl.broadcast_to(scales[:, :, None], (BLOCK_N, DOTS, DOT_K))
    FACTOR: tl.constexpr = code_factor(tl.float16, LEVELS, CONVERSION)
    w = (codes * FACTOR) * tl.reshape(scales, (BLOCK_N, BLOCK_K))
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask = (offs_n < rows)[:, None] & (offs_k < K)[None, :]
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=mask)
