"""y[m, n] = act(Σ_g scale[n, g] Σ_(k in g) q[n, k] x[m, k] + bias[n]) + residual[m, n], and ŵ.

Products are taken with the codes, which fp16 and bf16 hold exactly; the scale meets the fp32 sum.
So a K tile never crosses a group: where a group does not fill its tiles, x is masked.
The weight is the left operand, the only one that Hopper's tensor cores read from registers.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import torch
import triton
import triton.language as tl

from fqcompile.errors import NoKernelError
from fqcompile.kernels.tile_config import TileConfig
from fqcompile.kernels.triton.tiles import apply_activation, load_codes

_DEQUANTIZE_TILE = (32, 128)


@triton.jit
def _add_group_product(
    acc,
    x,
    q_ptr,
    scale_ptr,
    row_bytes,
    num_groups,
    offs_n,
    mask_n,
    k0,
    group,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_M] + scale * (codes @ x), for one tile inside one group."""
    codes = load_codes(q_ptr, row_bytes, offs_n, mask_n, k0, BITS, BLOCK_N, BLOCK_K)
    # [BLOCK_N]
    scale = tl.load(scale_ptr + offs_n.to(tl.int64) * num_groups + group, mask=mask_n, other=0.0)
    # "ieee" concerns fp32 only, which would otherwise be multiplied as tf32.
    product = tl.dot(codes.to(x.dtype), x, input_precision="ieee")
    return tl.fma(product, scale.to(tl.float32)[:, None], acc)


@triton.jit(do_not_specialize=["M"])
def _dequant_gemm_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_rm,
    row_bytes,
    num_groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that read the same weight tile are neighbours: L2 serves it to all but the first.
    num_pid_m = tl.cdiv(M, BLOCK_M)
    pid_m = tl.program_id(0) % num_pid_m
    pid_n = tl.program_id(0) // num_pid_m
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if GATED:
        acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    TILES_PER_GROUP: tl.constexpr = (GROUP_SIZE + BLOCK_K - 1) // BLOCK_K
    for tile in range(num_groups * TILES_PER_GROUP):
        group = tile // TILES_PER_GROUP
        k_begin = group * GROUP_SIZE
        k0 = k_begin + (tile % TILES_PER_GROUP) * BLOCK_K
        # An odd group may begin inside a byte: its tiles then begin one column early, masked. The
        # last one has room for that, since an odd group does not fill its tiles.
        if GROUP_SIZE % 2 == 1:
            k0 -= k_begin % 2
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = (offs_k < K) & (offs_k < k_begin + GROUP_SIZE) & (offs_k >= k_begin)
        # [BLOCK_K, BLOCK_M]
        x = tl.load(
            x_ptr + offs_m[None, :] * stride_xm + offs_k[:, None],
            mask=mask_k[:, None] & mask_m[None, :],
            other=0.0,
        )
        acc = _add_group_product(
            acc, x, q_ptr, scale_ptr, row_bytes, num_groups, offs_n, mask_n, k0, group,
            BITS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if GATED:
            acc_up = _add_group_product(
                acc_up, x, q_ptr, scale_ptr, row_bytes, num_groups, offs_n + N, mask_n, k0, group,
                BITS, BLOCK_N, BLOCK_K,
            )  # fmt: skip

    if HAS_BIAS:
        # [BLOCK_N]
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y = apply_activation(acc, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            # [BLOCK_N]
            acc_up += tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        y *= acc_up
    mask = mask_n[:, None] & mask_m[None, :]
    if HAS_RESIDUAL:
        # [BLOCK_N, BLOCK_M]
        residual = tl.load(
            residual_ptr + offs_m[None, :] * stride_rm + offs_n[:, None], mask=mask, other=0.0
        )
        y += residual.to(tl.float32)
    y_ptrs = y_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    q_ptr,
    scale_ptr,
    w_ptr,
    N,
    K,
    row_bytes,
    num_groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_pid_k = tl.cdiv(K, BLOCK_K)
    k0 = (tl.program_id(0) % num_pid_k) * BLOCK_K
    offs_n = (tl.program_id(0) // num_pid_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    codes = load_codes(q_ptr, row_bytes, offs_n, mask_n, k0, BITS, BLOCK_N, BLOCK_K)
    rows = offs_n.to(tl.int64)[:, None]
    # [BLOCK_N, BLOCK_K]
    scale = tl.load(
        scale_ptr + rows * num_groups + (offs_k // GROUP_SIZE)[None, :], mask, other=0.0
    )
    w = codes.to(tl.float32) * scale.to(tl.float32)
    tl.store(w_ptr + rows * K + offs_k[None, :], w.to(w_ptr.dtype.element_ty), mask=mask)


def _columns_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def dequant_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    config: TileConfig,
) -> torch.Tensor:
    """`act(x @ ŵᵀ + bias) + residual` [M, n] in x's dtype, for x [M, k] and residual [M, n].

    With `gated` the weight and bias have 2n rows, gate over up: `act(gate) * up + residual`.

    Raises:
        NoKernelError: `config` splits K.
    """
    if config.SPLIT_K != 1:
        raise NoKernelError(
            f"SPLIT_K={config.SPLIT_K}: this kernel does not split K, use SPLIT_K=1"
        )
    assert qweight.is_contiguous() and scale.is_contiguous(), "packed weights are contiguous"
    m = x.shape[0]
    y = x.new_empty((m, n))
    if y.numel() == 0:
        return y
    x = _columns_contiguous(x)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else _columns_contiguous(residual)
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    with torch.cuda.device_of(x):
        _dequant_gemm_kernel[(tiles,)](
            x, qweight, scale, bias, residual, y,
            m, n, k, x.stride(0), 0 if residual is None else residual.stride(0),
            qweight.shape[1], scale.shape[1],
            bits, min(group_size, k), activation, gated,
            bias is not None, residual is not None,
            config.BLOCK_M, config.BLOCK_N, config.BLOCK_K,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def dequantize(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """ŵ [n, k] in `dtype`: code times scale in fp32, rounded once."""
    assert qweight.is_contiguous() and scale.is_contiguous(), "packed weights are contiguous"
    w = torch.empty((n, k), dtype=dtype, device=qweight.device)
    if w.numel() == 0:
        return w
    block_n, block_k = _DEQUANTIZE_TILE
    tiles = triton.cdiv(n, block_n) * triton.cdiv(k, block_k)
    with torch.cuda.device_of(qweight):
        _dequantize_kernel[(tiles,)](
            qweight, scale, w, n, k, qweight.shape[1], scale.shape[1],
            bits, min(group_size, k), block_n, block_k,
        )  # fmt: skip
    return w


def _power_of_two(value: int, low: int, high: int) -> int:
    """The least power of two that is at least `value`, kept between `low` and `high`."""
    return min(high, max(low, 1 << (value - 1).bit_length()))


def closed_form_config(
    m_bucket: int, n: int, k: int, bits: int, group_size: int, gated: bool = False
) -> TileConfig:
    """A configuration without measuring; any row count is taken as its bucket of 16, 32, 64 or 128.

    BLOCK_K is the largest power of two that divides the group, so that no tile is partly masked;
    where that is below 32, and for one scale per column, it covers as much of the group as it can.
    The limits keep fp16 and bf16 kernels within the registers of sm_80 and sm_90.
    """
    block_m = _power_of_two(m_bucket, 16, 64 if gated else 128)
    wide = block_m >= 64
    block_n = _power_of_two(n, 16, 128 if wide else 64)
    group = min(group_size, k)
    divisor = group & -group
    target = divisor if divisor >= 32 and group < k else group
    block_k = _power_of_two(target, 16, 64 if wide else 128)
    return TileConfig(block_m, block_n, block_k, num_warps=8 if wide else 4, num_stages=3)
