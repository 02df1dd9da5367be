"""Launch the Triton kernels on tensors. Nothing here synchronizes with the device.

What every layer launches calls `kernel.run` itself: `kernel[grid](...)` makes a function that does,
and takes 0.6 us longer.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.epilogue import activation as activation_entry
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.template import Routing
from fqcompile.kernels.triton.arrivals import meeting_place
from fqcompile.kernels.triton.dependent_launch import early_launch
from fqcompile.kernels.triton.epilogue import finish_kernel
from fqcompile.kernels.triton.expert_gemm import expert_gemm_kernel, finish_experts_kernel
from fqcompile.kernels.triton.fragments import dequantize_kernel
from fqcompile.kernels.triton.gemm import gemm_kernel
from fqcompile.kernels.triton.layout import (
    BLOCK_K,
    MICRO_ROWS,
    SCALE_ROWS,
    blocks_per_group,
    dot_width,
)
from fqcompile.kernels.triton.target import conversion
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.torch_compat import grouped_mm

FINISH_BLOCK_N = 256
DEQUANTIZE_ROWS = 32
GROUPED_MM_ALIGNED = 8  # `torch._grouped_mm` takes rows of multiples of 16 bytes
PRODUCT = Epilogue()  # with split K: the finishing kernel applies the epilogue


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv would take 2 us."""
    return -(-a // b)


def has_two_sums(n: int, config: TileConfig) -> bool:
    """Whether gate and up can have an accumulator each.

    Up must begin at a micro-tile, and its last tile must read no scales beyond the padding.
    """
    fits = n % MICRO_ROWS == 0 and config.BLOCK_N <= SCALE_ROWS // 2
    return fits and (config.SPLIT_K == 1 or config.last_finishes)


def is_whole(n: int, gated: bool, config: TileConfig) -> bool:
    """Whether the GEMM's kernel computes all of y, with no other one that finishes."""
    alone = config.SPLIT_K == 1 or config.last_finishes
    return has_two_sums(n, config) if gated else alone


@cache
def forms_of(activation: str) -> tuple[object, object]:
    """The kernel arguments ACTIVATION and UP."""
    entry = activation_entry(activation)
    return entry.triton_form, entry.triton_up


_HERE = nullcontext()


def device_of(t: torch.Tensor) -> AbstractContextManager[object]:
    """A context that makes t's device the current one; free of cost if it already is."""
    index = t.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def dequant_gemm(
    x: torch.Tensor, weight: QuantizedTensor, epilogue: Epilogue, config: TileConfig, kwidth: int
) -> torch.Tensor:
    """`act(x @ ŵᵀ + bias) + residual` [M, N] in x's dtype, for x [M, K] and residual [M, N].

    With `gated` the weight and bias have 2 N rows, gate above up, and the result is
    `act(gate) * up(up) + residual`, with the `up` function of the activation. If gate and up
    cannot have an accumulator each, one product computes both and the finishing kernel combines
    them.
    """
    m, n = x.shape[0], epilogue.columns(weight.format.rows)
    if x.stride(1) != 1:
        x = x.contiguous()
    epilogue = with_whole_rows(epilogue)
    y = x.new_empty((m, n))
    with device_of(x):
        if is_whole(n, epilogue.gated, config):
            _gemm(x, weight, y, n, epilogue, config, kwidth, config.last_finishes)
            return y
        shares = x.new_empty((config.SPLIT_K, m, weight.format.rows), dtype=torch.float32)
        _gemm(x, weight, shares, weight.format.rows, PRODUCT, config, kwidth, False)
        _finish(shares, y, epilogue, config.SPLIT_K)
    return y


def _finish(shares: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, split: int) -> None:
    (m, n), (bias, residual, activation, gated) = y.shape, epilogue
    finish_kernel.run(
        shares, bias, residual, y, m, n, 0 if residual is None else residual.stride(0),
        *forms_of(activation), gated, split, FINISH_BLOCK_N,
        grid=(m * cdiv(n, FINISH_BLOCK_N),), warmup=False, num_warps=2, **early_launch(y.device),
    )  # fmt: skip


def dense_gemm(
    x: torch.Tensor, weight: QuantizedTensor, epilogue: Epilogue, kwidth: int
) -> torch.Tensor:
    """`dequant_gemm` by a dequantized ŵ and PyTorch's matmul, and one kernel for what follows."""
    z = F.linear(x, dequantize(weight, x.dtype, kwidth), epilogue.bias)
    epilogue = with_whole_rows(epilogue._replace(bias=None))
    if epilogue == PRODUCT:
        return z
    y = z.new_empty(z.shape[0], epilogue.columns(z.shape[1]))
    with device_of(x):
        _finish(z, y, epilogue, 1)
    return y


def with_whole_rows(epilogue: Epilogue) -> Epilogue:
    """The epilogue with a contiguous bias, and a residual whose columns are adjacent in memory."""
    bias, residual, activation, gated = epilogue
    if bias is None and residual is None:
        return epilogue
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    return Epilogue(None if bias is None else bias.contiguous(), residual, activation, gated)


def _gemm(
    x: torch.Tensor,
    weight: QuantizedTensor,
    y: torch.Tensor,
    n: int,
    epilogue: Epilogue,
    config: TileConfig,
    kwidth: int,
    last: bool,
) -> None:
    (m, k), f, device = x.shape, weight.format, x.device
    bias, residual, activation, gated = epilogue
    tiles = -(-m // config.BLOCK_M) * -(-n // config.BLOCK_N)
    meeting = meeting_place(x, (config.SPLIT_K, m, f.rows), tiles) if last else (None, None)
    gemm_kernel.run(
        x, weight.qweight, weight.scale, bias, residual, y, *meeting,
        m, n, k, x.stride(0), 0 if residual is None else residual.stride(0),
        *format_of(f.group_size, k), f.bits, f.levels, kwidth, conversion(device, x.dtype),
        *forms_of(activation), gated, k % BLOCK_K == 0,
        config.BLOCK_M, config.BLOCK_N, BLOCK_K, config.SPLIT_K,
        grid=(tiles, config.SPLIT_K), warmup=False,
        num_warps=config.num_warps, num_stages=config.num_stages, **early_launch(device),
    )  # fmt: skip


@cache
def format_of(group_size: int, k: int) -> tuple[int, int]:
    """The kernel arguments BLOCKS_PER_GROUP and DOT_K."""
    return blocks_per_group(group_size, k), dot_width(group_size, k)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype, kwidth: int) -> torch.Tensor:
    """ŵ [rows, k] or [E, rows, k] in `dtype`: code times scale in fp32, rounded once."""
    stack = weight.qweight.shape[:-4]
    w = torch.empty(
        (*stack, weight.format.rows, weight.format.k), dtype=dtype, device=weight.qweight.device
    )
    if w.numel() == 0:
        return w
    tiles = cdiv(weight.format.rows, DEQUANTIZE_ROWS) * cdiv(weight.format.k, BLOCK_K)
    with device_of(w):
        dequantize_kernel[(tiles, *stack)](
            weight.qweight, weight.scale, w, weight.format.rows, weight.format.k, bool(stack),
            *format_of(weight.format.group_size, weight.format.k), weight.format.bits,
            weight.format.levels, kwidth, conversion(w.device, torch.float16), DEQUANTIZE_ROWS,
            BLOCK_K,
        )  # fmt: skip
    return w


def most_blocks(m: int, experts: int, block_m: int) -> int:
    """The most blocks that m rows can need: each expert with rows may have one that is not full."""
    with_rows = min(m, experts)
    return with_rows + (m - with_rows) // block_m


def filled_up(experts: int) -> int:
    """The smallest power of two that is at least `experts`."""
    return 1 << max(0, experts - 1).bit_length()


def rows_of(routing: Routing) -> torch.Tensor:
    """The offsets or the ids."""
    given = routing.ids if routing.offsets is None else routing.offsets
    assert given is not None, "one of the two is given"
    return given.contiguous()


def expert_gemm(
    x: torch.Tensor,
    weight: QuantizedTensor,
    routing: Routing,
    epilogue: Epilogue,
    config: TileConfig,
    kwidth: int,
) -> torch.Tensor:
    """`act(x[m] @ ŵ[e(m)]ᵀ + bias[e(m)])` [M, N] in x's dtype; gated as in `dequant_gemm`.

    Rows beyond the last offset are not initialized; a row whose id names no expert is NaN.
    """
    m, n = x.shape[0], epilogue.columns(weight.format.rows)
    if x.stride(1) != 1:
        x = x.contiguous()
    epilogue = with_whole_rows(epilogue)
    y = x.new_empty((m, n))
    with device_of(x):
        if is_whole(n, epilogue.gated, config):
            _expert_gemm(x, weight, routing, y, n, epilogue, config, kwidth, config.last_finishes)
            return y
        shares = x.new_empty((config.SPLIT_K, m, weight.format.rows), dtype=torch.float32)
        _expert_gemm(x, weight, routing, shares, weight.format.rows, PRODUCT, config, kwidth, False)
        _finish_experts(shares, weight, routing, y, epilogue, config.SPLIT_K)
    return y


def _finish_experts(
    shares: torch.Tensor,
    weight: QuantizedTensor,
    routing: Routing,
    y: torch.Tensor,
    epilogue: Epilogue,
    split: int,
) -> None:
    (m, n), (bias, _, activation, gated) = y.shape, epilogue
    experts = weight.qweight.shape[0]
    finish_experts_kernel.run(
        shares, rows_of(routing), bias, y, m, n, experts,
        routing.offsets is not None, filled_up(experts), *forms_of(activation), gated, split,
        FINISH_BLOCK_N, grid=(m * cdiv(n, FINISH_BLOCK_N),), warmup=False, num_warps=2,
        **early_launch(y.device),
    )  # fmt: skip


def _expert_gemm(
    x: torch.Tensor,
    weight: QuantizedTensor,
    routing: Routing,
    y: torch.Tensor,
    n: int,
    epilogue: Epilogue,
    config: TileConfig,
    kwidth: int,
    last: bool,
) -> None:
    (m, k), f, device = x.shape, weight.format, x.device
    experts, grouped = weight.qweight.shape[0], routing.offsets is not None
    blocks = most_blocks(m, experts, config.BLOCK_M) if grouped else m
    tiles = blocks * cdiv(n, config.BLOCK_N)
    meeting = meeting_place(x, (config.SPLIT_K, m, f.rows), tiles) if last else (None, None)
    expert_gemm_kernel.run(
        x, weight.qweight, weight.scale, rows_of(routing), epilogue.bias, y, *meeting,
        m, n, k, experts, blocks, x.stride(0), grouped, filled_up(experts),
        *format_of(f.group_size, k), f.bits, f.levels, kwidth, conversion(device, x.dtype),
        *forms_of(epilogue.activation), epilogue.gated, k % BLOCK_K == 0,
        config.BLOCK_M, config.BLOCK_N, BLOCK_K, config.SPLIT_K,
        grid=(tiles, config.SPLIT_K), warmup=False,
        num_warps=config.num_warps, num_stages=config.num_stages, **early_launch(device),
    )  # fmt: skip


def dense_experts(
    x: torch.Tensor, weight: QuantizedTensor, offsets: torch.Tensor, epilogue: Epilogue, kwidth: int
) -> torch.Tensor:
    """`expert_gemm` by a dequantized ŵ [E, rows, K] and PyTorch's grouped matmul of bf16."""
    if x.stride(1) != 1 or x.stride(0) % GROUPED_MM_ALIGNED or x.data_ptr() % 16:
        x = x.contiguous()
    w_hat = dequantize(weight, x.dtype, kwidth)
    z = grouped_mm(x, w_hat.transpose(1, 2), offs=offsets.to(torch.int32))
    epilogue = with_whole_rows(epilogue)
    if epilogue == PRODUCT:
        return z
    y = z.new_empty(z.shape[0], epilogue.columns(z.shape[1]))
    with device_of(x):
        _finish_experts(z, weight, Routing(offsets), y, epilogue, 1)
    return y


def sorted_by_expert(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, Routing, torch.Tensor]:
    """The rows in the order of their experts, their offsets, and which rows have no expert.

    Those come last, beyond the last offset. Nothing is copied to the host.
    """
    own = torch.where(ids < 0, ids + experts, ids)
    unknown = (own < 0) | (own >= experts)
    ordered, order = own.masked_fill(unknown, experts).sort(stable=True)
    each = torch.arange(experts, device=ids.device, dtype=ordered.dtype)
    return order, Routing(torch.searchsorted(ordered, each, right=True, out_int32=True)), unknown
