"""The epilogue in Triton: bias, activation, gate x up, residual, and the sum of split-K partials.

The activations are those of the table `fqcompile.kernels.epilogue.ACTIVATIONS`, fp32 in and out.
Split-K partial sums are added in a fixed order before the epilogue. They are called shares here.
Whoever adds them gets the same bits: a second kernel, or the last program of a tile (`_is_last`).
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl

from fqcompile.kernels.triton.dependent_launch import wait_for_earlier_kernels


@triton.jit
def none(z):
    return z


@triton.jit
def relu(z):
    # `tl.maximum` would turn NaN into 0.
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_tanh(z):
    # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2 / pi) * (z + 0.044715 z^3).
    return z * tl.sigmoid(1.5957691216057308 * tl.fma(0.044715 * z * z, z, z))


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def swiglu_oai(z):
    # `tl.minimum` would turn NaN into 7.
    z = tl.where(z > 7.0, 7.0, z)
    return z * tl.sigmoid(1.702 * z)


@triton.jit
def swiglu_oai_up(z):
    z = tl.where(z > 7.0, 7.0, z)
    return tl.where(z < -7.0, -7.0, z) + 1.0


@triton.jit
def store(
    acc, acc_up, bias_ptr, residual_ptr, y_ptr, shares_ptr, arrivals_ptr, offs_m, offs_n, mask, M,
    N, stride_rm, ACTIVATION: tl.constexpr, UP: tl.constexpr, GATED: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue and store the output.

    With SPLIT_K > 1 store the share instead: to y, which is [SPLIT_K, M, N] then; or if there are
    arrivals to shares [SPLIT_K, M, N], or [SPLIT_K, M, 2 N] with gate before up, of which the last
    program of the tile makes the output.
    """
    rows = offs_m[None, :].to(tl.int64)
    if SPLIT_K == 1:
        _store_output(
            acc, acc_up, bias_ptr, residual_ptr, y_ptr, rows, offs_n, mask, N, stride_rm,
            ACTIVATION, UP, GATED,
        )  # fmt: skip
    elif arrivals_ptr is None:
        share = tl.program_id(1).to(tl.int64) * M * N
        tl.store(y_ptr + share + rows * N + offs_n[:, None], acc, mask=mask)
    else:
        columns = 2 * N if GATED else N
        stride = M.to(tl.int64) * columns
        offs = rows * columns + offs_n[:, None]
        own_ptr = shares_ptr + tl.program_id(1) * stride
        tl.store(own_ptr + offs, acc, mask=mask)
        if GATED:
            tl.store(own_ptr + N + offs, acc_up, mask=mask)
        if _is_last(arrivals_ptr + tl.program_id(0), SPLIT_K):
            acc = _sum_of_shares(shares_ptr, offs, mask, stride, SPLIT_K)
            if GATED:
                acc_up = _sum_of_shares(shares_ptr, offs + N, mask, stride, SPLIT_K)
            _store_output(
                acc, acc_up, bias_ptr, residual_ptr, y_ptr, rows, offs_n, mask, N, stride_rm,
                ACTIVATION, UP, GATED,
            )  # fmt: skip


@triton.jit
def _is_last(counter_ptr, SPLIT_K: tl.constexpr):
    """Count this program in; whether it is the last, which sees what all others have stored.

    The barrier puts the stores of all threads before the atomic of one of them; Triton by itself
    promises that of this one's stores alone. The atomic releases them to the programs that come
    after, and acquires what came before; its result reaches all threads through a barrier too. The
    last program sets the counter back to 0 for the next launch.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _store_output(
    acc, acc_up, bias_ptr, residual_ptr, y_ptr, rows, offs_n, mask, N, stride_rm,
    ACTIVATION: tl.constexpr, UP: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    columns = offs_n[:, None]
    mask_n = offs_n < N
    if bias_ptr is not None:
        # [BLOCK_N]
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y = ACTIVATION(acc)
    if GATED:
        if bias_ptr is not None:
            # [BLOCK_N]
            bias = tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0)
            acc_up += bias.to(tl.float32)[:, None]
        y *= UP(acc_up)
    if residual_ptr is not None:
        # [BLOCK_N, BLOCK_M]
        residual = tl.load(residual_ptr + rows * stride_rm + columns, mask=mask, other=0.0)
        y += residual.to(tl.float32)
    tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_shares(shares_ptr, offs, mask, stride, SPLIT_K: tl.constexpr):
    """Their sum, in order, at the offsets of the first; each is `stride` after the one before."""
    AT_ONCE: tl.constexpr = SPLIT_K if SPLIT_K < 8 else 8  # loads under way together
    total = tl.zeros(offs.shape, tl.float32)
    for first in range(0, SPLIT_K, AT_ONCE):
        for share in tl.static_range(AT_ONCE):
            # [*offs.shape], past L1: other programs have written them.
            part = tl.load(
                shares_ptr + (first + share) * stride + offs, mask=mask, other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            total += part.to(tl.float32)
    return total


@triton.jit
def finish_row(
    shares_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    m,
    offs_n,
    M,
    N,
    stride_rm,
    ACTIVATION: tl.constexpr,
    UP: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the shares of row m (int64) at the columns offs_n, apply the epilogue, and store to y."""
    mask = offs_n < N
    columns = 2 * N if GATED else N
    stride = M.to(tl.int64) * columns
    offs = m * columns + offs_n
    y = _sum_of_shares(shares_ptr, offs, mask, stride, SPLIT_K)
    if bias_ptr is not None:
        # [BLOCK_N]
        y += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    y = ACTIVATION(y)
    if GATED:
        up = _sum_of_shares(shares_ptr, offs + N, mask, stride, SPLIT_K)
        if bias_ptr is not None:
            # [BLOCK_N]
            up += tl.load(bias_ptr + N + offs_n, mask=mask, other=0.0).to(tl.float32)
        y *= UP(up)
    if residual_ptr is not None:
        # [BLOCK_N]
        residual = tl.load(residual_ptr + m * stride_rm + offs_n, mask=mask, other=0.0)
        y += residual.to(tl.float32)
    tl.store(y_ptr + m * N + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    shares_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    stride_rm,
    ACTIVATION: tl.constexpr,
    UP: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """y [M, N] from shares [SPLIT_K, M, N], or [SPLIT_K, M, 2 N] with gate before up.

    One share in 16 bits is a product that PyTorch made.
    """
    wait_for_earlier_kernels(PDL)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // num_pid_n).to(tl.int64)
    offs_n = (tl.program_id(0) % num_pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    finish_row(
        shares_ptr, bias_ptr, residual_ptr, y_ptr, m, offs_n, M, N, stride_rm,
        ACTIVATION, UP, GATED, SPLIT_K, BLOCK_N,
    )  # fmt: skip
