"""The usual way to write such a kernel, as a measure for the one of `fqcompile.kernels.triton`.

Nibbles of neighboring columns share a byte, the weight is the right operand, and each number is
dequantized before the product: the form of most public kernels.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def plain_kernel(
    x_ptr,
    qweight_ptr,
    scale_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_qn,
    stride_sn,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [M, N] from x [M, K], qweight uint8 [N, K / 2] with the even column low, scale [N, K / G].

    BLOCK_K divides K, and GROUP_SIZE is a multiple of BLOCK_K.
    """
    num_pid_m = tl.cdiv(M, BLOCK_M)
    offs_m = (tl.program_id(0) % num_pid_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // num_pid_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    rows = tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    q_ptrs = qweight_ptr + rows[:, None] * stride_qn + tl.arange(0, BLOCK_K // 2)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs + k0, mask=mask_m[:, None], other=0.0)
        # [BLOCK_N, BLOCK_K / 2]
        packed = tl.load(q_ptrs + k0 // 2)
        # [BLOCK_N]
        scale = tl.load(scale_ptr + rows * stride_sn + k0 // GROUP_SIZE)
        codes = tl.reshape(tl.join(packed & 15, packed >> 4), (BLOCK_N, BLOCK_K))
        w = (codes.to(tl.int8) - 8).to(x.dtype) * scale.to(x.dtype)[:, None]
        acc = tl.dot(x, w.T, acc)
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)
