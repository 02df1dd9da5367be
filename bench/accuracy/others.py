"""4-bit weights by other libraries, dequantized by their own functions; each counts its bits.

A library that is not installed is left out with that reason. None runs a kernel of its own here:
what is compared is the quality of the values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from bench.accuracy.quantized import Quantizer

_SCALE_BITS = 16


@dataclass(frozen=True)
class Baseline:
    """A library's way; `quantizer` imports the library when it is called."""

    name: str
    package: str
    quantizer: Quantizer


def _hqq(group_size: int, w: Tensor) -> tuple[Tensor, float]:
    """HQQ's default for 4 bits, groups along K; its scale and zero rounded to 16 bits."""
    library = import_module("hqq.core.quantize")
    options = library.BaseQuantizeConfig(nbits=4, group_size=group_size, axis=1)
    chosen = options["weight_quant_params"]
    codes, meta = library.Quantizer.quantize(w, device="cpu", compute_dtype=torch.float32, **chosen)
    for name in ("scale", "zero"):
        meta[name] = meta[name].half().float()
    w_hat = library.Quantizer.dequantize(codes, meta)
    return w_hat, 4 + _stored_bits(meta["scale"], meta["zero"]) / w.numel()


def _nf4(blocksize: int, w: Tensor) -> tuple[Tensor, float]:
    """bitsandbytes' NF4, no double quantization: blocks of the flattened matrix, fp32 scales."""
    library = import_module("bitsandbytes.functional")
    codes, state = library.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
    w_hat = library.dequantize_4bit(codes, state)
    return w_hat, 8 * (codes.nbytes + state.absmax.nbytes) / w.numel()


def _torchao(group_size: int, w: Tensor) -> tuple[Tensor, float]:
    """torchao's int4 weight-only rounding to nearest (tinygemm): scale and zero in 16 bits."""
    library = import_module("torchao.quantization.quant_primitives")
    block = (1, group_size)
    codes_of = {"quant_min": 0, "quant_max": 15}
    scale, zero = library._choose_qparams_affine_tinygemm(
        w,
        library.MappingType.ASYMMETRIC,
        block,
        torch.int32,
        **codes_of,
        eps=1e-6,
        scale_dtype=torch.float16,
        zero_point_dtype=torch.float16,
    )
    exact = scale.float(), zero.float()
    codes = library._quantize_affine_tinygemm(w, block, *exact, torch.int32, **codes_of)
    w_hat = library._dequantize_affine_tinygemm(
        codes, block, *exact, torch.int32, **codes_of, output_dtype=torch.float32
    )
    return w_hat, 4 + _stored_bits(scale, zero) / w.numel()


def _q4_0(block: int, w: Tensor) -> tuple[Tensor, float]:
    """llama.cpp's Q4_0. Its Q4_K the package reads, and writes none."""
    library = import_module("gguf")
    codes = library.quantize(w.numpy(), library.GGMLQuantizationType.Q4_0)
    w_hat = torch.from_numpy(library.dequantize(codes, library.GGMLQuantizationType.Q4_0))
    return w_hat, 8 * codes.nbytes / w.numel()


def _stored_bits(*tensors: Tensor) -> int:
    return sum(_SCALE_BITS * t.numel() for t in tensors)


def _baselines(
    name: str, package: str, quantizer: Callable[[int, Tensor], tuple[Tensor, float]], *sizes: int
) -> list[Baseline]:
    return [Baseline(f"{name} g{g}", package, partial(quantizer, g)) for g in sizes]


BASELINES = [
    *_baselines("hqq", "hqq", _hqq, 128, 64),
    *_baselines("nf4", "bitsandbytes", _nf4, 64),
    *_baselines("torchao", "torchao", _torchao, 128, 64, 32),
    *_baselines("llama.cpp q4_0", "gguf", _q4_0, 32),
]
