"""The x86 kernel: memory-bound for few rows of x, compute-bound for many.

The C++ (native/) does the whole layer in one call: routing, product, bias, activation, gate x up,
residual. Sums are fp32. bf16 activations meet codes in bf16, which is exact, where the processor
multiplies bf16; all others are widened to fp32. None is ever quantized.

The first call registers an implementation of `fqcompile::matmul` in C++ (native/operator.cpp).
Usual calls go there from then on, without Python; what is not usual comes here.

Dequantizing and PyTorch's GEMM is not faster for any number of rows: one core with AVX-512 BF16,
N = K = 4096, int4, milliseconds at M = 64, 128, 256, 512: this 14, 31, 60, 121, F.linear on the
dense bf16 weight 20, 31, 60, 114, by panels 28, 38, 70, 132. Only AMX multiplies bf16 much faster.
"""

import sys
from functools import cache
from struct import Struct
from threading import RLock

import torch
from torch import Tensor

from fqcompile.kernels.cpu.stream_layout import (
    OUTPUTS,
    dequantize,
    gather,
    narrow,
    pack,
    shapes,
    unpack,
)
from fqcompile.kernels.epilogue import ACTIVATIONS, Epilogue
from fqcompile.kernels.spec import Config, GemmSpec
from fqcompile.kernels.template import Layout, Routing, Template
from fqcompile.locks import fork_safe, in_forked_child
from fqcompile.native import library as native
from fqcompile.native.interface import DTYPES, LEVELS_AT
from fqcompile.native.library import NativeLibrary
from fqcompile.tensor.format import QTYPES
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.torch_compat import has_amx

# As enumerated in epilogue.h.
_ACTIVATIONS = {name: i for i, name in enumerate(ACTIVATIONS)}
# The structs that the C++ functions read; all fields have eight bytes.
_MATMUL, _DEQUANTIZE, _SETTINGS = Struct("=24q"), Struct("=14q"), Struct("=2q")

# With AMX, PyTorch's GEMM does 8 times the bf16 products of AVX-512 a cycle: from so many rows on
# that pays for dequantizing. From the instructions' rates: no such processor was measured.
AMX_ROWS = 64
_PANEL = 1 << 20  # weights that are dequantized at a time, and multiplied while in the cache


def _refuse(spec: GemmSpec) -> str | None:
    if spec.device_type != "cpu":
        return f"runs on cpu, not {spec.device_type}"
    if (spec.bits, spec.levels) not in QTYPES:
        known = ", ".join(qtype.name for qtype in QTYPES.values())
        return f"takes {known}, not {spec.bits} bits with {spec.levels} levels"
    odd = [t for t in (spec.dtype, spec.scale_dtype) if t not in DTYPES]
    if odd:
        return f"takes fp32, bf16 and fp16, not {odd[0]}"
    return native.refusal()


def _run(
    x: Tensor,
    weight: QuantizedTensor,
    routing: Routing | None,
    epilogue: Epilogue,
    config: Config | None,
) -> Tensor:
    if routing is None:
        if _has_amx() and x.shape[0] >= AMX_ROWS and x.dtype == torch.bfloat16:
            return _multiply_many(x, weight, epilogue)
        return _multiply(x, weight, None, epilogue)[0]
    y, known = _multiply(x, weight, routing, epilogue)
    if not known:  # tells which entry is wrong
        list(routing.rows_of_experts(weight.qweight.shape[0], x.shape[0]))
        raise AssertionError("the routing was refused by the kernel alone")
    return y


@cache
def _has_amx() -> bool:
    return bool(has_amx())


_serving: list[NativeLibrary] = []  # at most one
_lock = fork_safe(RLock())


def serve(library: NativeLibrary | None) -> None:
    """Let PyTorch's dispatcher call this library for usual calls; without one it calls Python."""
    with _lock:
        if library not in _serving:
            while _serving:
                _serving.pop().serve(None)
        if library is not None and not _serving:
            most = AMX_ROWS - 1 if _has_amx() else sys.maxsize
            library.serve(_SETTINGS.pack(most, in_forked_child()))
            _serving.append(library)


def _multiply(
    x: Tensor, weight: QuantizedTensor, routing: Routing | None, epilogue: Epilogue
) -> tuple[Tensor, bool]:
    """One C++ call with little Python; False if the routing names a missing expert or row."""
    qweight, scale, f = weight.qweight, weight.scale, weight.format
    rows, k = f.rows, f.k
    bias, residual, activation, gated = epilogue
    if not (qweight.is_contiguous() and scale.is_contiguous()):
        qweight, scale = qweight.contiguous(), scale.contiguous()
    x_rows, x_columns = x.stride()
    if x_columns != 1:
        x, x_rows = x.contiguous(), k
    m = x.shape[0]
    y = x.new_empty(m, rows // 2 if gated else rows)
    bias_at = bias_type = residual_at = residual_rows = told_at = told_bytes = 0
    experts = 1
    if bias is not None:
        bias = bias.contiguous()
        bias_at, bias_type = bias.data_ptr(), DTYPES[bias.dtype]
    if residual is not None:
        residual = residual.contiguous()
        residual_at, residual_rows = residual.data_ptr(), residual.stride(0)
    by_id = False
    if routing is not None:
        offsets, ids = routing
        by_id = ids is not None
        told = ids if ids is not None else offsets
        assert told is not None
        told = told.contiguous()
        experts, told_at, told_bytes = qweight.shape[0], told.data_ptr(), told.element_size()
    fields = _MATMUL.pack(
        qweight.data_ptr(), scale.data_ptr(), DTYPES[scale.dtype], LEVELS_AT[f.levels],
        f.bits, f.group_size if f.group_size < k else k, rows, k,
        x.data_ptr(), x_rows, DTYPES[x.dtype], m,
        bias_at, bias_type, residual_at, residual_rows,
        y.data_ptr(), _ACTIVATIONS[activation], gated,
        experts, told_at, by_id, told_bytes, in_forked_child(),
    )  # fmt: skip
    library = native.native_library()
    if library not in _serving:
        serve(library)
    return y, library.matmul(fields) == 0


def _multiply_many(x: Tensor, weight: QuantizedTensor, epilogue: Epilogue) -> Tensor:
    """A panel of the weight at a time is dequantized, and multiplied by PyTorch's GEMM."""
    z = x.new_empty(x.shape[0], weight.format.rows)
    blocks = max(1, _PANEL // (weight.format.k * OUTPUTS))
    for first in range(0, weight.format.rows, blocks * OUTPUTS):
        last = min(first + blocks * OUTPUTS, weight.format.rows)
        torch.mm(x, _transposed(weight, first, last, x.dtype), out=z[:, first:last])
    return epilogue.apply(z)


def _transposed(weight: QuantizedTensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """ŵᵀ [K, last - first] of those rows; `first` is a multiple of 64."""
    library = native.native_library()
    qweight, scale, f = weight.qweight.contiguous(), weight.scale.contiguous(), weight.format
    panel = torch.empty(f.k, last - first, dtype=dtype)
    library.dequantize(
        _DEQUANTIZE.pack(
            qweight.data_ptr(),
            scale.data_ptr(),
            DTYPES[scale.dtype],
            LEVELS_AT[f.levels],
            f.bits,
            min(f.group_size, f.k),
            f.rows,
            f.k,
            first // OUTPUTS,
            -(-(last - first) // OUTPUTS),
            DTYPES[dtype],
            panel.data_ptr(),
            panel.stride(0),
            in_forked_child(),
        )
    )
    return panel


def _dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """ŵ [rows, K]: by the kernel where there is one, which another machine's file may lack."""
    if weight.qweight.device.type != "cpu" or dtype not in DTYPES or native.refusal() is not None:
        return dequantize(weight, dtype)
    return _transposed(weight, 0, weight.format.rows, dtype).t().contiguous()


STREAM = Layout("x86_stream_1", pack, shapes, _dequantize, unpack, narrow, gather)
X86_STREAM = Template("x86_stream", STREAM, _refuse, lambda spec: None, _run)
