"""From packed words in memory to the weight operand of a dot, or to the weight itself.

The conversion never leaves the registers.

The bits 0-7 of a bf16, or 0-10 of an fp16, count in equal steps across the border of the subnormal
numbers, so a masked word already is two small numbers, code * 2^-133 or code * 2^-24. One fma each
scales them and takes the offset away: (code - offset) / code_factor, exact. ("subnormal")

Shifting bytes down makes the compiler treat the halves of a word apart, which doubles the
instructions for int8; one `prmt` in PTX does not. ("subnormal_prmt", NVIDIA alone)

Where a GPU flushes those numbers, the exponent of 128 or 1024 is put before the code and that
number subtracted again: the same value by more instructions. ("exponent")

`join`, `reshape` and `permute` in this order are what the compiler folds into a renaming of
registers; other spellings send the weight through shared memory.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl

from fqcompile.kernels.triton import layout

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
def code_factor(DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """What a dot's result is to be multiplied with."""
    FACTOR: tl.constexpr = (
        1.0 if CONVERSION == "exponent" else (2.0**6 if DTYPE == tl.bfloat16 else 2.0**9)
    )
    return FACTOR


@triton.jit
def _halves(v, DTYPE: tl.constexpr):
    return v.to(tl.int16).to(DTYPE, bitcast=True), (v >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _scaled(v, SCALE: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """The two numbers in each word times SCALE plus OFFSET, as a last dimension of 2."""
    low, high = _halves(v, DTYPE)
    scale = tl.full(low.shape, SCALE, DTYPE)
    offset = tl.full(low.shape, OFFSET, DTYPE)
    return tl.join(tl.fma(low, scale, offset), tl.fma(high, scale, offset))


@triton.jit
def _nibbles(v, SECOND: tl.constexpr, DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """Codes - 8 of the first or second nibble of each half word."""
    if CONVERSION != "exponent":
        LEAST: tl.constexpr = 2.0**127 if DTYPE == tl.bfloat16 else 2.0**15
        OFFSET: tl.constexpr = -8 * 2.0**-6 if DTYPE == tl.bfloat16 else -8 * 2.0**-9
        if SECOND:
            numbers = _scaled(v & 0x00F000F0, LEAST / 16, OFFSET, DTYPE)
        else:
            numbers = _scaled(v & 0x000F000F, LEAST, OFFSET, DTYPE)
    else:
        if SECOND:
            v = v >> 4
        if DTYPE == tl.bfloat16:
            numbers = _scaled((v & 0x000F000F) | 0x43004300, 1.0, -136.0, DTYPE)
        else:
            numbers = _scaled((v & 0x000F000F) | 0x64006400, 1.0, -1032.0, DTYPE)
    return numbers


@triton.jit
def _second_bytes(v, CONVERSION: tl.constexpr):
    """v >> 8 as far as `_bytes` reads it."""
    if CONVERSION == "subnormal_prmt":
        second = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        second = v >> 8
    return second


@triton.jit
def _bytes(v, DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """Codes - 128 of the first byte of each half word."""
    if CONVERSION != "exponent":
        if DTYPE == tl.bfloat16:
            numbers = _scaled(v & 0x00FF00FF, 2.0**127, -128 * 2.0**-6, DTYPE)
        else:
            numbers = _scaled(v & 0x00FF00FF, 2.0**15, -128 * 2.0**-9, DTYPE)
    else:
        if DTYPE == tl.bfloat16:
            # Eight bits do not fit behind 128: 16 * (high nibble - 8) + low nibble.
            low = _scaled((v & 0x000F000F) | 0x43004300, 1.0, -128.0, DTYPE)
            high = _scaled(((v >> 4) & 0x000F000F) | 0x43004300, 1.0, -136.0, DTYPE)
            numbers = tl.fma(high, tl.full(high.shape, 16.0, DTYPE), low)
        else:
            numbers = _scaled((v & 0x00FF00FF) | 0x64006400, 1.0, -1152.0, DTYPE)
    return numbers


@triton.jit
def operand(
    words,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    KWIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    CONVERSION: tl.constexpr,
):
    """[rows, WIDTH] in DTYPE, (code - offset) / code_factor, from words [rows, 4, chunks]."""
    ROWS: tl.constexpr = words.shape[0]
    CHUNKS: tl.constexpr = words.shape[2]
    if BITS == 4:
        w = tl.join(
            _nibbles(words, False, DTYPE, CONVERSION), _nibbles(words, True, DTYPE, CONVERSION)
        )
        if WIDTH == 16:
            w = tl.reshape(w, (ROWS, 4, CHUNKS, 2, 2, 1))
        else:
            rest = words >> 8
            second = tl.join(
                _nibbles(rest, False, DTYPE, CONVERSION), _nibbles(rest, True, DTYPE, CONVERSION)
            )
            w = tl.join(w, second)
        # dimensions n, t, c, p, h, rep -> n, c, rep, place(t, h, p)
        if KWIDTH == 2:
            w = tl.permute(w, (0, 2, 5, 4, 1, 3))
        else:
            w = tl.permute(w, (0, 2, 5, 1, 4, 3))
    else:
        w = tl.join(
            _bytes(words, DTYPE, CONVERSION),
            _bytes(_second_bytes(words, CONVERSION), DTYPE, CONVERSION),
        )
        # dimensions n, t, c, p, h -> n, c, place(t, h, p)
        if KWIDTH == 2:
            w = tl.permute(w, (0, 2, 4, 1, 3))
        else:
            w = tl.permute(w, (0, 2, 1, 4, 3))
    return tl.reshape(w, (ROWS, WIDTH))


@triton.jit
def first_and_second_half(words, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """The words of the first WIDTH / 2 columns, and of the others."""
    if BITS == 4 and WIDTH == 32:
        first, second = words, words >> 8
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
    codes = operand(words, BLOCK_K, BITS, KWIDTH, tl.float16, CONVERSION).to(tl.float32)
    group = block // BLOCKS_PER_GROUP if BLOCKS_PER_GROUP > 0 else 0
    scales = load_scales(scale_ptr, offs_n, rows, group, BLOCK_N, DOTS).to(tl.float32)
    scales = tl.broadcast_to(scales[:, :, None], (BLOCK_N, DOTS, DOT_K))
    FACTOR: tl.constexpr = code_factor(tl.float16, CONVERSION)
    w = (codes * FACTOR) * tl.reshape(scales, (BLOCK_N, BLOCK_K))
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask = (offs_n < rows)[:, None] & (offs_k < K)[None, :]
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=mask)
