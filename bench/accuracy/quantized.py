"""A model with the weights it would have under each way of quantizing, at its true size.

All ways quantize the same matrices: those that `fqcompile.quantize_` would, without the head. All
else stays fp32: embeddings, head, norms, biases, routers.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

import fqcompile
from bench.core.results import Row
from fqcompile.config import FineQuantConfig
from fqcompile.modules.weights import module_weights
from fqcompile.passes.summary import SiteRecipe
from fqcompile.quant.checks import relative_error
from fqcompile.quant.granularity import bits_per_weight
from fqcompile.report import Site

# The head takes 8 bits by default; here nobody's head is quantized, so that nobody gains by it.
NO_HEAD = {"exclude": [r"(^|\.)(lm_head|embed_tokens|project_in|project_out|pooler)\b"]}

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# A matrix [N, K] to its dequantized value and the bits that are stored for each weight.
Quantizer = Callable[[Tensor], tuple[Tensor, float]]


@dataclass(frozen=True)
class QuantizedWeight:
    """What became of one parameter; `group_size` is None where a library does not say."""

    name: str
    elements: int
    bits: float
    error: float
    group_size: int | None = None

    @property
    def layer_type(self) -> str:
        return layer_type(self.name)


def layer_type(name: str) -> str:
    """A parameter's name without layer numbers: q_proj, fc1, experts.down_proj."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if parts[-2:-1] == ["experts"] else parts[-1]


@dataclass(frozen=True)
class Quantized:
    """A model of dequantized weights, and how each was stored."""

    model: nn.Module
    weights: tuple[QuantizedWeight, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized weights together, scales counted."""
        stored = sum(w.bits * w.elements for w in self.weights)
        return stored / sum(w.elements for w in self.weights)

    @property
    def mean_error(self) -> float:
        """Mean of the matrices' relative errors."""
        return fmean(w.error for w in self.weights)

    def errors_by_type(self) -> dict[str, float]:
        """The mean error of the matrices of each layer type."""
        types = dict.fromkeys(w.layer_type for w in self.weights)
        return {t: fmean(w.error for w in self.weights if w.layer_type == t) for t in types}


def ours(model: nn.Module, options: Mapping[str, Any]) -> Quantized:
    """By fqcompile's public functions: a plan, and its values in a copy of the model."""
    plan = fqcompile.quantize_(copy.deepcopy(model), **{**NO_HEAD, **options})
    if not plan.quantized:
        raise ValueError(f"nothing is quantized under {dict(options)}:\n{plan}")
    plain = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
    return Quantized(plain, tuple(_of_site(site) for site in plan.quantized))


def _of_site(site: Site) -> QuantizedWeight:
    planned = cast(SiteRecipe, site.recipe).plan
    n, k = site.shape[-2:]
    scale_bits = torch.finfo(planned.scale_dtype).bits
    bits = bits_per_weight(planned.bits, n, k, planned.group_size, scale_bits)
    elements = site.num_weights
    return QuantizedWeight(site.name, elements, bits, planned.relative_error, planned.group_size)


def theirs(model: nn.Module, quantizer: Quantizer) -> Quantized:
    """By another library: each matrix alone, each expert of a stack alone."""
    plain = copy.deepcopy(model)
    found = [
        w for w in module_weights(plain, FineQuantConfig.from_options(NO_HEAD)) if w.reason is None
    ]
    weights = []
    for one in found:
        matrix = one.matrix.detach()
        pieces = [quantizer(m.contiguous()) for m in (matrix if matrix.dim() == 3 else [matrix])]
        w_hat = torch.stack([piece for piece, _ in pieces]).view(matrix.shape)
        bits = sum(bits for _, bits in pieces) / len(pieces)
        error = relative_error(matrix.flatten(0, -2), w_hat.flatten(0, -2))
        weights.append(QuantizedWeight(one.name, matrix.numel(), bits, error))
        matrix.copy_(w_hat)
    return Quantized(plain, tuple(weights))


def range_rows(model: nn.Module) -> Iterator[Row]:
    """How wide the weights of each layer type are: what one scale per column has to cover.

    Of each output column, its largest weight over its root mean square; of these ratios the
    quantiles. A Gaussian column of 256 weights has about 2.9.
    """
    ratios: dict[str, list[Tensor]] = {}
    for weight in module_weights(model, FineQuantConfig.from_options(NO_HEAD)):
        if weight.reason is None:
            columns = weight.matrix.detach().flatten(0, -2)
            ratio = columns.abs().amax(1) / columns.square().mean(1).sqrt()
            ratios.setdefault(layer_type(weight.name), []).append(ratio)
    for name, parts in ratios.items():
        quantiles = torch.cat(parts).quantile(torch.tensor(QUANTILES)).tolist()
        yield {"layer_type": name, "quantiles": quantiles}
