"""PyTorch's own packed bf16 CPU kernels, used where they are exact and faster than dequantizing.

Measured on two AVX-512 BF16 cores, N = K = 4096, bf16, milliseconds at M = 1, 16, 64, 128: dense
1.6, 2.4, 5.9, 10.9; int8pack .7, 3.8, 13.9, 29.4; int4pack .5, 3.2, 12.5, 25.1; dequantizing int8
4.9, 6.0, 9.6, 18.6, int4 8.1, 9.3, 13.3, 22.8. With fp32 or fp16 activations both kernels are 2 to
50 times slower than dense, so they serve bf16 only.
"""

import torch

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import (
    PLAIN,
    Layout,
    PackedTensors,
    Shape,
    Template,
    multiply_dequantized,
    one_by_one,
)
from fqcompile.tensor.codes import unpack
from fqcompile.tensor.format import INT4, UNIFORM
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.torch_compat import int4pack_mm, int8pack_mm, pack_int4

# Above these row counts dequantizing once and multiplying densely is faster (table above).
INT8_MAX_ROWS = 32
INT4_MAX_ROWS = 64
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_ROW_MULTIPLE = 64
_INT8_K_MULTIPLE = 16


def _refuse_common(spec: GemmSpec, bits: int) -> str | None:
    if spec.device_type != "cpu":
        return f"runs on cpu, not {spec.device_type}"
    if spec.bits != bits:
        return f"takes {bits}-bit weights, not {spec.bits}-bit"
    if spec.levels != UNIFORM:
        return f"takes {UNIFORM} levels, not {spec.levels}"
    if spec.dtype != torch.bfloat16 or spec.scale_dtype != torch.bfloat16:
        return f"takes bf16 activations and scales, not {spec.dtype} and {spec.scale_dtype}"
    return None


def _refuse_int8(spec: GemmSpec) -> str | None:
    if spec.group_size < spec.k:
        return f"takes one scale per column, not groups of {spec.group_size}"
    if spec.k % _INT8_K_MULTIPLE:
        return f"reads K in blocks of {_INT8_K_MULTIPLE} and beyond its end for K={spec.k}"
    return _refuse_common(spec, 8)


def _multiply_int8(x: torch.Tensor, weight: QuantizedTensor, epilogue: Epilogue) -> torch.Tensor:
    if x.shape[0] > INT8_MAX_ROWS:
        return multiply_dequantized(x, weight, epilogue)
    z = int8pack_mm(x.contiguous(), weight.qweight, weight.scale.view(-1))
    return epilogue.apply(z)


def _refuse_int4(spec: GemmSpec) -> str | None:
    if spec.group_size not in _INT4_GROUPS or spec.k % spec.group_size:
        return f"takes groups of {_INT4_GROUPS} that divide K={spec.k}, not {spec.group_size}"
    if spec.weight_rows % _INT4_ROW_MULTIPLE:
        return f"takes a multiple of {_INT4_ROW_MULTIPLE} weight rows, not {spec.weight_rows}"
    if spec.needs_backward:
        return "its layout cannot be dequantized for a backward pass"
    # Experts have one layout for all numbers of rows: prefill and decode share their weights.
    if spec.m > INT4_MAX_ROWS and not spec.experts:
        return f"is slower than dequantizing above {INT4_MAX_ROWS} rows; the example has {spec.m}"
    return _refuse_common(spec, 4)


def _int4_shapes(bits: int, group_size: int, rows: int, k: int) -> tuple[Shape, Shape]:
    return (rows, k * bits // 8), (k // group_size, rows, 2)


def _pack_int4(weight: QuantizedTensor) -> PackedTensors:
    """Codes offset to 0..15 in aten's order; scales [K/G, N, 2], each with aten's zero point."""
    codes = unpack(weight.qweight, INT4, weight.format.k).to(torch.int32) + 8
    qweight = pack_int4(codes, 1)
    scale = weight.scale.t().contiguous()
    return qweight, torch.stack((scale, torch.zeros_like(scale)), dim=-1)


def _multiply_int4(x: torch.Tensor, weight: QuantizedTensor, epilogue: Epilogue) -> torch.Tensor:
    z = int4pack_mm(x.contiguous(), weight.qweight, weight.format.group_size, weight.scale)
    return epilogue.apply(z)


ATEN_INT4_CPU = Layout("aten_int4_cpu", _pack_int4, _int4_shapes)
INT8PACK = Template(
    "aten_int8pack", PLAIN, _refuse_int8, lambda spec: None, one_by_one(_multiply_int8)
)
INT4PACK = Template(
    "aten_int4pack", ATEN_INT4_CPU, _refuse_int4, lambda spec: None, one_by_one(_multiply_int4)
)
