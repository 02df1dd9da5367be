"""The ways of quantizing that `bench draws` compares, each from a matrix to its values and bits.

Ours are the package's own functions, calibrated by random token ids as a compile is
("synthetic"), or by what the name says. Libraries that are not installed are not among them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import fqcompile
from bench.accuracy.gemma import FileMatrix, dithered_gemma, matrices
from bench.accuracy.others import BASELINES
from bench.accuracy.quantized import Quantizer
from bench.accuracy.subjects import Moment, Subject, error_weights, second_moments
from bench.core.results import missing
from fqcompile.config import SiteOptions
from fqcompile.modules.calibrate import random_batch
from fqcompile.quant.choose import QuantPlan, choose_and_quantize, scale_dtype_beside
from fqcompile.quant.gptq import compensate, factor_of, refusal
from fqcompile.quant.granularity import bits_per_weight

BASE = "int4 uniform g64"
FILE = "llama.cpp q4_k_m"
PEERS = "hqq g64", "nf4 g64", "torchao g64", "llama.cpp q4_0 g32"  # 4.5 bits each
# By way of a file, which has the order of the model alone: one draw.
EXPORTED = "int4 uniform g64, synthetic, exported", "int4 uniform g64, gptq, exported"
ORDERLESS = frozenset((FILE, *EXPORTED))
# (name, w, order): dequantized values of w [N, K] or [E, N, K], and the bits stored for each.
# `order` [K] says which input channels of the parameter the columns are.
Way = Callable[[str, Tensor, Tensor], tuple[Tensor, float]]


# Found when they are first asked for, by the model as it is then: before its first matrix changes.
ErrorWeights = Callable[[], Mapping[str, Tensor]]
Moments = Callable[[], Mapping[str, Sequence[Moment]]]


def our_way(options: Mapping[str, object], h: ErrorWeights | None = None) -> Way:
    """By fqcompile, with the weights of squared errors of each parameter's columns in its order."""
    chosen = SiteOptions(**options)  # type: ignore[arg-type]
    scale_dtype = scale_dtype_beside(torch.float32)

    def way(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        weights = None if h is None else h()[name][..., order].contiguous()
        plan, quantized = choose_and_quantize(w, chosen, scale_dtype, weights)
        return quantized.dequantize(torch.float32), _bits(plan, w)

    return way


def gptq_way(options: Mapping[str, object], h: ErrorWeights, moments: Moments) -> Way:
    """The same with error feedback, each expert alone; too few rows leave it as it is."""
    chosen = SiteOptions(**options)  # type: ignore[arg-type]
    scale_dtype = scale_dtype_beside(torch.float32)

    def one(w: Tensor, h: Tensor, moment: Moment, order: Tensor) -> tuple[Tensor, float]:
        plan, quantized = choose_and_quantize(w, chosen, scale_dtype, h[order].contiguous())
        if refusal(moment.sum, moment.rows) is None:
            compensate(w, quantized, factor_of(moment.sum[order][:, order].contiguous()))
        return quantized.dequantize(torch.float32), _bits(plan, w)

    def way(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        found = w.view(-1, *w.shape[-2:]), h()[name].view(-1, w.shape[-1]), moments()[name]
        pieces = [one(*each, order) for each in zip(*found, strict=True)]
        return torch.stack([w_hat for w_hat, _ in pieces]), pieces[0][1]

    return way


def _bits(plan: QuantPlan, w: Tensor) -> float:
    scale_bits = torch.finfo(plan.scale_dtype).bits
    return bits_per_weight(plan.bits, *w.shape[-2:], plan.group_size, scale_bits)


def their_way(quantizer: Quantizer) -> Way:
    """By another library: each matrix of a stack alone."""

    def way(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        pieces = [quantizer(matrix) for matrix in (w if w.dim() == 3 else [w])]
        return torch.stack([w_hat for w_hat, _ in pieces]), fmean(bits for _, bits in pieces)

    return way


def ways_of(subject: Subject) -> dict[str, Way]:
    """All that are compared, `BASE` first; libraries that are not installed are not there."""

    def h(calibration: object) -> ErrorWeights:
        return cache(partial(error_weights, subject, calibration))

    synthetic, text = h("synthetic"), h(subject.text)
    found: dict[str, Way] = {BASE: our_way(_options("uniform", 64))}
    found["int4 normal g64"] = our_way(_options("normal", 64))
    for size in (64, 128, 32, "adaptive", "range", "column"):
        name = f"g{size}" if isinstance(size, int) else size
        found[f"int4 normal {name}, synthetic"] = our_way(_options("normal", size), synthetic)
    found["int4 uniform g64, synthetic"] = our_way(_options("uniform", 64), synthetic)
    found["int4 normal g64, text"] = our_way(_options("normal", 64), text)
    ids = random_batch(subject.model)["input_ids"]
    given = {"16 ids": ids[:1], "one token": ids[:1, 1:2].expand_as(ids), "German": subject.german}
    for data, few in given.items():
        if len(few):
            found[f"int4 normal g64, {data}"] = our_way(_options("normal", 64), h(few))
    moments = cache(partial(second_moments, subject, subject.text))
    for levels in ("normal", "uniform"):
        found[f"int4 {levels} g64, gptq"] = gptq_way(_options(levels, 64), text, moments)
    found["int8 g128"] = our_way({"bits": 8, "granularity": 128})
    present = [b for b in BASELINES if b.name in PEERS and missing(b.package) is None]
    found |= {b.name: their_way(b.quantizer) for b in present}
    return found | (_ways_of_files(subject.text) if subject.name == "gemma" else {})


def _ways_of_files(text: Sequence[Tensor]) -> dict[str, Way]:
    by_scale, by_data = EXPORTED
    return {
        by_scale: exported_way({"calibration": "synthetic"}),
        by_data: exported_way({"calibration": text, "method": "gptq"}),
        FILE: file_way(),
    }


def _options(levels: str, granularity: int | str) -> dict[str, object]:
    return {"bits": 4, "levels": levels, "granularity": granularity}


def file_way() -> Way:
    """llama.cpp's own matrices: the dithered ones, rounded to the file's grids."""

    @cache
    def found() -> dict[str, FileMatrix]:
        return {matrix.name: matrix for matrix in matrices()}

    def way(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        return found()[name].values[:, order], found()[name].bits

    return way


def exported_way(options: Mapping[str, object]) -> Way:
    """The matrices that transformers multiplies with, of what `fqcompile export` wrote of Gemma."""
    chosen = {"bits": 4, "granularity": 64, **options}
    found = cache(lambda: exported(dithered_gemma()[0], chosen))

    def way(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        scale_bits = torch.finfo(scale_dtype_beside(w.dtype)).bits
        w_hat = found().get_parameter(name).detach()[:, order]
        return w_hat, bits_per_weight(4, *w.shape, 64, scale_bits)

    return way


@torch.no_grad()
def exported(model: Any, options: Mapping[str, Any]) -> nn.Module:
    """As transformers loads what `export` makes of it with these options, in the same dtype.

    Its own code unpacks the weights, on the first call; from then on they are dense parameters.
    """
    with TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        model.save_pretrained(source)
        fqcompile.export(source, out, dtype=model.dtype, **options)
        loaded: Any = type(model).from_pretrained(out, dtype=model.dtype, local_files_only=True)
        loaded.eval()(torch.zeros(1, 1, dtype=torch.long))
    found: nn.Module = loaded
    return found
