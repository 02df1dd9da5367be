"""Our x86 kernel: packed weights at the memory's speed for few rows of x, at the cores' for many.

The C++ (native/) does the whole layer in one call: routing, product, bias, activation, gate x up,
residual. Sums are fp32. bf16 activations meet codes in bf16, which is exact, where the processor
multiplies bf16; all others are widened to fp32. None is ever quantised.

Dequantising and PyTorch's GEMM is not faster for any number of rows: one core with AVX-512 BF16,
N = K = 4096, int4, milliseconds at M = 64, 128, 256, 512: this 14, 31, 60, 121, F.linear on the
dense bf16 weight 20, 31, 60, 114, by panels 28, 38, 70, 132. Only AMX multiplies bf16 much faster.
"""

from functools import cache
from struct import Struct

import torch
from torch import Tensor

from fqcompile.kernels.cpu import native_library as native
from fqcompile.kernels.cpu.stream_layout import (
    OUTPUTS,
    dequantize,
    narrow,
    pack,
    shapes,
    unpack,
)
from fqcompile.kernels.epilogue import ACTIVATIONS, apply_epilogue
from fqcompile.kernels.launch_table import Config
from fqcompile.kernels.routing import Routing
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import Layout, PackedLinear, Template
from fqcompile.locks import in_forked_child
from fqcompile.tensor.format import QTYPES
from fqcompile.torch_compat import has_amx


class _Numbers(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise RuntimeError(f"the x86 kernel takes fp32, bf16 and fp16, not {dtype}")


# As enumerated in vectors.h and epilogue.h.
DTYPES = _Numbers({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
_ACTIVATIONS = {name: i for i, name in enumerate(ACTIVATIONS)}
# The structs that the two C++ functions read; all fields have eight bytes.
_MATMUL, _DEQUANTIZE = Struct("=23q"), Struct("=13q")

# With AMX, PyTorch's GEMM does 8 times the bf16 products of AVX-512 a cycle: from so many rows on
# that pays for dequantising. From the instructions' rates: no such processor was measured.
AMX_ROWS = 64
_PANEL = 1 << 20  # weights that are dequantised at a time, and multiplied while in the cache


def _refuse(spec: GemmSpec) -> str | None:
    if spec.device_type != "cpu":
        return f"runs on cpu, not {spec.device_type}"
    if spec.bits not in QTYPES:
        return f"takes int4 and int8, not {spec.bits} bits"
    odd = [t for t in (spec.dtype, spec.scale_dtype) if t not in DTYPES]
    if odd:
        return f"takes fp32, bf16 and fp16, not {odd[0]}"
    return native.refusal()


def _linear(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gated: bool,
    config: Config | None,
) -> Tensor:
    if _has_amx() and x.shape[0] >= AMX_ROWS and x.dtype == torch.bfloat16:
        return _linear_of_many(x, weight, bias, residual, activation, gated)
    y, _ = _multiply(x, weight, None, bias, residual, activation, gated)
    return y


def _experts(
    x: Tensor,
    weight: PackedLinear,
    offsets: Tensor | None,
    ids: Tensor | None,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    config: Config | None,
) -> Tensor:
    routing = offsets if ids is None else ids
    y, known = _multiply(x, weight, routing, bias, None, activation, gated, ids is not None)
    if not known:  # tells which entry is wrong
        list(Routing(offsets, ids).rows_of_experts(weight.qweight.shape[0], x.shape[0]))
        raise AssertionError("the routing was refused by the kernel alone")
    return y


@cache
def _has_amx() -> bool:
    return bool(has_amx())


def _multiply(
    x: Tensor,
    weight: PackedLinear,
    routing: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gated: bool,
    ids: bool = False,
) -> tuple[Tensor, bool]:
    """One C++ call, of little Python; False where the routing names what is not there."""
    qweight, scale, bits, group_size, rows, k = weight
    if not (qweight.is_contiguous() and scale.is_contiguous()):
        qweight, scale = qweight.contiguous(), scale.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    m = x.shape[0]
    y = x.new_empty(m, rows // 2 if gated else rows)
    bias_fields, residual_fields, routing_fields = (0, 0), (0, 0), (1, 0, 0, 0)
    if bias is not None:
        bias = bias.contiguous()
        bias_fields = bias.data_ptr(), DTYPES[bias.dtype]
    if residual is not None:
        residual = residual.contiguous()
        residual_fields = residual.data_ptr(), residual.stride(0)
    if routing is not None:
        routing = routing.contiguous()
        routing_fields = qweight.shape[0], routing.data_ptr(), ids, routing.element_size()
    status = native.native_library().matmul(
        _MATMUL.pack(
            qweight.data_ptr(),
            scale.data_ptr(),
            DTYPES[scale.dtype],
            bits,
            group_size if group_size < k else k,
            rows,
            k,
            x.data_ptr(),
            x.stride(0),
            DTYPES[x.dtype],
            m,
            *bias_fields,
            *residual_fields,
            y.data_ptr(),
            _ACTIVATIONS[activation],
            gated,
            *routing_fields,
            in_forked_child(),
        )
    )
    return y, status == 0


def _linear_of_many(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """A panel of the weight at a time is dequantised, and multiplied by PyTorch's GEMM."""
    z = x.new_empty(x.shape[0], weight.rows)
    blocks = max(1, _PANEL // (weight.k * OUTPUTS))
    for first in range(0, weight.rows, blocks * OUTPUTS):
        last = min(first + blocks * OUTPUTS, weight.rows)
        torch.mm(x, _transposed(weight, first, last, x.dtype), out=z[:, first:last])
    return apply_epilogue(z, bias, residual, activation, gated)


def _transposed(weight: PackedLinear, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """ŵᵀ [K, last - first] of those rows; `first` is a multiple of 64."""
    library = native.native_library()
    qweight, scale, bits, group_size, rows, k = weight
    qweight, scale = qweight.contiguous(), scale.contiguous()
    panel = torch.empty(k, last - first, dtype=dtype)
    library.dequantize(
        _DEQUANTIZE.pack(
            qweight.data_ptr(),
            scale.data_ptr(),
            DTYPES[scale.dtype],
            bits,
            min(group_size, k),
            rows,
            k,
            first // OUTPUTS,
            -(-(last - first) // OUTPUTS),
            DTYPES[dtype],
            panel.data_ptr(),
            panel.stride(0),
            in_forked_child(),
        )
    )
    return panel


def _dequantize(weight: PackedLinear, dtype: torch.dtype) -> Tensor:
    """ŵ [rows, K]: by the kernel where there is one, which another machine's file may lack."""
    if weight.qweight.device.type != "cpu" or dtype not in DTYPES or native.refusal() is not None:
        return dequantize(weight, dtype)
    return _transposed(weight, 0, weight.rows, dtype).t().contiguous()


STREAM = Layout("x86_stream_1", pack, shapes, _dequantize, unpack, narrow)
X86_STREAM = Template("x86_stream", STREAM, _refuse, lambda spec: None, _linear, experts=_experts)
