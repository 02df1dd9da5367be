"""Launches the kernels of the family on a stack of experts. Nothing here waits for the device."""

import torch

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.template import PackedLinear, Routing
from fqcompile.kernels.tile_config import TileConfig
from fqcompile.kernels.triton.expert_gemm import expert_gemm_kernel, finish_experts_kernel
from fqcompile.kernels.triton.launch import (
    FINISH_BLOCK_N,
    PRODUCT,
    cdiv,
    dequantize,
    device_of,
    format_of,
    forms_of,
    has_two_sums,
    with_whole_rows,
)
from fqcompile.kernels.triton.layout import BLOCK_K
from fqcompile.kernels.triton.schedule import schedule_kernel
from fqcompile.kernels.triton.target import conversion
from fqcompile.torch_compat import grouped_mm

SCHEDULE_TILE = 2048  # experts times blocks that a program of the schedule compares
GROUPED_MM_ALIGNED = 8  # `torch._grouped_mm` takes rows of multiples of 16 bytes


def most_blocks(m: int, experts: int, block_m: int) -> int:
    """The most blocks that m rows can fall into: each expert with rows has one that is not full."""
    with_rows = min(m, experts)
    return with_rows + (m - with_rows) // block_m


def filled_up(experts: int) -> int:
    """The power of two that holds them."""
    return 1 << max(0, experts - 1).bit_length()


def schedule_of(offsets: torch.Tensor, m: int, block_m: int) -> torch.Tensor:
    """int32 [blocks, 3]: expert or -1, first row, end; of a length that offsets do not change."""
    experts = offsets.shape[0]
    blocks = most_blocks(m, experts, block_m)
    schedule = torch.empty((blocks, 3), dtype=torch.int32, device=offsets.device)
    wide = filled_up(experts)
    each = max(1, min(filled_up(blocks), SCHEDULE_TILE // wide))
    schedule_kernel[(cdiv(blocks, each),)](
        offsets.contiguous(), schedule, m, experts, blocks, block_m, wide, each
    )
    return schedule


def expert_gemm(
    x: torch.Tensor,
    weight: PackedLinear,
    routing: Routing,
    epilogue: Epilogue,
    config: TileConfig,
    kwidth: int,
) -> torch.Tensor:
    """`act(x[m] @ ŵ[e(m)]ᵀ + bias[e(m)])` [M, N] in x's dtype; gated as in `dequant_gemm`.

    Rows beyond the last offset keep what was in memory; a row whose id names no expert is NaN.
    """
    m, n = x.shape[0], epilogue.columns(weight.rows)
    if x.stride(1) != 1:
        x = x.contiguous()
    epilogue = with_whole_rows(epilogue)
    y = x.new_empty((m, n))
    direct = has_two_sums(n, config) if epilogue.gated else config.SPLIT_K == 1
    with device_of(x):
        if direct:
            _gemm(x, weight, routing, y, n, epilogue, config, kwidth)
            return y
        shares = x.new_empty((config.SPLIT_K, m, weight.rows), dtype=torch.float32)
        _gemm(x, weight, routing, shares, weight.rows, PRODUCT, config, kwidth)
        grouped = routing.offsets is not None
        rows_of = routing.offsets if grouped else routing.ids
        assert rows_of is not None
        bias, _, activation, gated = epilogue
        experts = weight.qweight.shape[0]
        finish_experts_kernel[(m * cdiv(n, FINISH_BLOCK_N),)](
            shares, rows_of.contiguous(), bias, y, m, n, experts,
            grouped, filled_up(experts), *forms_of(activation), gated, config.SPLIT_K,
            FINISH_BLOCK_N, num_warps=2,
        )  # fmt: skip
    return y


def _gemm(
    x: torch.Tensor,
    weight: PackedLinear,
    routing: Routing,
    y: torch.Tensor,
    n: int,
    epilogue: Epilogue,
    config: TileConfig,
    kwidth: int,
) -> None:
    m, k = x.shape
    grouped = routing.offsets is not None
    if routing.offsets is not None:
        rows_of_blocks = schedule_of(routing.offsets, m, config.BLOCK_M)
        blocks = rows_of_blocks.shape[0]
    else:
        assert routing.ids is not None
        rows_of_blocks, blocks = routing.ids.contiguous(), m
    expert_gemm_kernel[(blocks * cdiv(n, config.BLOCK_N), config.SPLIT_K)](
        x, weight.qweight, weight.scale, rows_of_blocks, epilogue.bias, y,
        m, n, k, weight.qweight.shape[0], blocks, x.stride(0), grouped,
        *format_of(weight.group_size, k), weight.bits, kwidth, conversion(x.device, x.dtype),
        *forms_of(epilogue.activation), epilogue.gated, k % BLOCK_K == 0,
        config.BLOCK_M, config.BLOCK_N, BLOCK_K, config.SPLIT_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def dense_experts(
    x: torch.Tensor, weight: PackedLinear, offsets: torch.Tensor, epilogue: Epilogue, kwidth: int
) -> torch.Tensor:
    """The same by way of ŵ [E, rows, K] and PyTorch's grouped matmul, which takes bf16."""
    if x.stride(1) != 1 or x.stride(0) % GROUPED_MM_ALIGNED or x.data_ptr() % 16:
        x = x.contiguous()
    w_hat = dequantize(weight, x.dtype, kwidth)
    z = grouped_mm(x, w_hat.transpose(1, 2), offs=offsets.to(torch.int32))
    if epilogue.bias is not None:
        rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets, rows, right=True)
        # Rows beyond the last offset have none; what they get does not matter.
        z = z + epilogue.bias[expert.clamp_(max=offsets.shape[0] - 1)]
    return epilogue.apply_to_biased(z)
