"""ŵ [rows, K], or a stack of such, from the fragment layout: code times scale, rounded once."""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl

from fqcompile.kernels.triton.fragments import code_factor, operand
from fqcompile.kernels.triton.gemm import (
    MICRO_ROWS,
    load_scales,
    load_words,
    scales_of_an_expert,
    word_offsets,
    words_of_an_expert,
)


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
