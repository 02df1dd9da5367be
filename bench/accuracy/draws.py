"""How much each way of quantizing loses, averaged over draws of which weights share a scale.

One rounding is one draw: another order of the input channels changes nothing but which weights
share a scale, and moves a small model's divergence by a tenth. So each way quantizes the same
matrices in the same `DRAWS` orders, the first of them the model's own, and ways are compared by the
mean. Both spreads are given: over draws, and over documents (a bootstrap in which a way is paired
with `BASE`).
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean, stdev

import torch
from torch import Tensor

from bench.accuracy.quantized import Quantizer
from bench.accuracy.rows import interval
from bench.accuracy.subjects import Subject
from bench.core.results import Row
from fqcompile.config import SiteOptions
from fqcompile.quant.choose import choose_and_quantize, scale_dtype_beside
from fqcompile.quant.granularity import bits_per_weight

DRAWS = 6
BASE = "int4 uniform g64"
# (name, w, order): dequantized values of w [N, K] or [E, N, K], and the bits stored for each.
# `order` [K] says which input channels of the parameter the columns are.
Way = Callable[[str, Tensor, Tensor], tuple[Tensor, float]]


def our_way(options: Mapping[str, object], h: Mapping[str, Tensor] | None = None) -> Way:
    """By fqcompile, with the weights of squared errors of each parameter's columns in its order."""
    chosen = SiteOptions(**options)  # type: ignore[arg-type]
    scale_dtype = scale_dtype_beside(torch.float32)

    def way(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        weights = None if h is None else h[name][..., order].contiguous()
        plan, quantized = choose_and_quantize(w, chosen, scale_dtype, weights)
        scale_bits = torch.finfo(plan.scale_dtype).bits
        bits = bits_per_weight(plan.bits, *w.shape[-2:], plan.group_size, scale_bits)
        return quantized.dequantize(torch.float32), bits

    return way


def their_way(quantizer: Quantizer) -> Way:
    """By another library: each matrix of a stack alone."""

    def way(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        pieces = [quantizer(matrix) for matrix in (w if w.dim() == 3 else [w])]
        return torch.stack([w_hat for w_hat, _ in pieces]), fmean(bits for _, bits in pieces)

    return way


def order_of(k: int, draw: int) -> Tensor:
    """Of K input channels; matrices that read the same input get the same."""
    if draw == 0:
        return torch.arange(k)
    return torch.randperm(k, generator=torch.Generator().manual_seed(draw))


@torch.no_grad()
def drawn(subject: Subject, way: Way, draws: int) -> tuple[Tensor, float]:
    """Divergences [draws, D], and the bits stored for each weight, of the last draw.

    Afterwards the model's weights are the exact ones again.
    """
    exact = {name: weight.matrix.clone() for name, weight in subject.weights.items()}
    found, stored = [], 0.0
    try:
        for draw in range(draws):
            stored = 0.0
            for name, w in exact.items():
                order = order_of(w.shape[-1], draw)
                w_hat, bits = way(name, w[..., order].contiguous(), order)
                subject.weights[name].matrix.copy_(w_hat.view(w.shape)[..., order.argsort()])
                stored += bits * w.numel()
            found.append(subject.divergence())
    finally:
        for name, weight in subject.weights.items():
            weight.matrix.copy_(exact[name])
    return torch.stack(found), stored / sum(w.numel() for w in exact.values())


def draw_rows(subject: Subject, ways: Mapping[str, Way], draws: int = DRAWS) -> Iterator[Row]:
    """A row for each way; the first is the one that the others are paired with."""
    base: Tensor | None = None
    for name, way in ways.items():
        divergence, bits = drawn(subject, way, draws)
        by_document, by_draw = divergence.mean(0), divergence.mean(1).tolist()
        base = by_document if base is None else base
        low, high = interval(by_document, torch.ones_like(by_document))
        least, most = interval(by_document, base)
        yield {
            "way": name,
            "bits_per_weight": bits,
            "divergence": fmean(by_draw),
            "divergence_low": low,
            "divergence_high": high,
            "draws": by_draw,
            "spread": stdev(by_draw) if draws > 1 else 0.0,
            "ratio": (by_document.sum() / base.sum()).item(),
            "ratio_low": least,
            "ratio_high": most,
        }
