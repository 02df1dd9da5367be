"""How much a way of quantizing loses, averaged over draws of which weights share a scale.

One rounding is one draw: another order of the input channels changes nothing but which weights
share a scale, and moves a small model's divergence by a tenth. So each way quantizes the same
matrices in the same `DRAWS` orders, the first of them the model's own, and ways are compared by the
mean. Both spreads are given: over draws, and over documents (a bootstrap in which a way is paired
with `BASE`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from bench.accuracy.quantized import NO_HEAD, Quantizer
from bench.accuracy.rows import interval
from bench.core.results import Row
from fqcompile.config import FineQuantConfig
from fqcompile.modules.weights import ModuleWeight, module_weights

DRAWS = 6
BASE = "int4 uniform g64"
# Of a parameter of this name: the quantizer of its matrices [N, K], whose input channels have been
# brought into this order [K].
Way = Callable[[str, Tensor], Quantizer]


@dataclass(frozen=True)
class Subject:
    """A model whose weights are replaced in place.

    Attributes:
        weights: of name, the matrices that every way quantizes.
        divergence: of the model as it is from the exact one, [D] by document, float64.
    """

    name: str
    model: nn.Module
    weights: Mapping[str, ModuleWeight]
    divergence: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, model: nn.Module, divergence: Callable[[], Tensor]) -> "Subject":
        found = module_weights(model, FineQuantConfig.from_options(NO_HEAD))
        return cls(name, model, {w.name: w for w in found if w.reason is None}, divergence)


@dataclass(frozen=True)
class Drawn:
    """Divergences [draws, D] of one way, and the bits that it stores for each weight."""

    divergence: Tensor
    bits_per_weight: float


def order(k: int, draw: int) -> Tensor:
    """Of K input channels; matrices that read the same input get the same."""
    if draw == 0:
        return torch.arange(k)
    return torch.randperm(k, generator=torch.Generator().manual_seed(draw))


@torch.no_grad()
def drawn(subject: Subject, way: Way, draws: int = DRAWS) -> Drawn:
    """The model's divergence under each order; its weights are the exact ones again after that."""
    exact = {name: weight.matrix.clone() for name, weight in subject.weights.items()}
    found, stored = [], 0.0
    try:
        for draw in range(draws):
            stored = sum(_replace(w, exact[n], n, way, draw) for n, w in subject.weights.items())
            found.append(subject.divergence())
    finally:
        for name, weight in subject.weights.items():
            weight.matrix.copy_(exact[name])
    return Drawn(torch.stack(found), stored / sum(w.numel() for w in exact.values()))


def _replace(weight: ModuleWeight, exact: Tensor, name: str, way: Way, draw: int) -> float:
    """Puts in what a way makes of a matrix or of each expert of a stack; the bits stored."""
    place = order(exact.shape[-1], draw)
    quantizer, back = way(name, place), place.argsort()
    matrices = exact[..., place].contiguous()
    pieces = [quantizer(m) for m in (matrices if matrices.dim() == 3 else [matrices])]
    weight.matrix.copy_(torch.stack([w_hat for w_hat, _ in pieces])[..., back].view(exact.shape))
    return exact.numel() * fmean(bits for _, bits in pieces)


def draw_rows(subject: Subject, ways: Mapping[str, Way], draws: int = DRAWS) -> Iterator[Row]:
    """A row for each way, beside `BASE`, which is the first."""
    base: Tensor | None = None
    for name, way in {BASE: ways[BASE], **ways}.items():
        found = drawn(subject, way, draws)
        by_document = found.divergence.mean(0)
        base = by_document if base is None else base
        by_draw = found.divergence.mean(1).tolist()
        low, high = interval(by_document, torch.ones_like(by_document))
        least, most = interval(by_document, base)
        yield {
            "way": name,
            "bits_per_weight": found.bits_per_weight,
            "divergence": fmean(by_draw),
            "divergence_low": low,
            "divergence_high": high,
            "draws": by_draw,
            "spread": stdev(by_draw) if len(by_draw) > 1 else 0.0,
            "ratio": (by_document.sum() / base.sum()).item(),
            "ratio_low": least,
            "ratio_high": most,
        }
