"""How much each way of quantizing loses, averaged over draws of which weights share a scale.

    python -m bench draws [--model gemma MiniLM ...] [--way REGEX] [--draws 6] [--json FILE]

One rounding is one draw: another order of the input channels changes nothing but which weights
share a scale, and moves a small model's divergence by a tenth. So each way quantizes the same
matrices in the same orders, the first of them the model's own, and ways are compared by the mean.
Both spreads are given: over draws, and over documents (a bootstrap in which a way is paired with
`BASE`). Ours are the package's own functions, calibrated by random token ids as a compile is
("synthetic"), or by what the name says.

Rows that the file has already are not measured again; each has its commit.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor
from tqdm import tqdm

from bench.accuracy.draws_section import draws as draws_section
from bench.accuracy.gemma import FileMatrix, matrices
from bench.accuracy.others import BASELINES
from bench.accuracy.quantized import Quantizer
from bench.accuracy.rows import interval
from bench.accuracy.subjects import (
    Moment,
    Subject,
    error_weights,
    gemma_subject,
    minilm_subject,
    second_moments,
    trained_subject,
)
from bench.accuracy.train_lm import FAMILIES, SIZES
from bench.core.results import Results, Row, commit, missing
from bench.core.section import show
from fqcompile.config import SiteOptions
from fqcompile.demo.gemma import gemma_missing
from fqcompile.modules.calibrate import random_batch
from fqcompile.quant.choose import QuantPlan, choose_and_quantize, scale_dtype_beside
from fqcompile.quant.gptq import compensate, factor_of, refusal
from fqcompile.quant.granularity import bits_per_weight

DRAWS = 6
BASE = "int4 uniform g64"
FILE = "llama.cpp q4_k_m"
_ORDERLESS = frozenset((FILE,))  # the same whatever the order
MODELS = "gemma", "MiniLM", *FAMILIES
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


def row_of(name: str, divergence: Tensor, bits: float, base: Tensor) -> Row:
    """Of divergences [draws, D], beside those of `BASE` [D]."""
    by_document, by_draw = divergence.mean(0), divergence.mean(1).tolist()
    low, high = interval(by_document, torch.ones_like(by_document))
    least, most = interval(by_document, base)
    return {
        "way": name,
        "bits_per_weight": bits,
        "divergence": fmean(by_draw),
        "divergence_low": low,
        "divergence_high": high,
        "draws": by_draw,
        "documents": by_document.tolist(),
        "spread": stdev(by_draw) if len(by_draw) > 1 else 0.0,
        "ratio": (by_document.sum() / base.sum()).item(),
        "ratio_low": least,
        "ratio_high": most,
        "commit": commit(),
    }


def draw_rows(
    subject: Subject, ways: Mapping[str, Way], draws: int, known: Sequence[Row] = ()
) -> Iterator[Row]:
    """A row for each way but those known; `BASE` is the first."""
    kept = (row["documents"] for row in known if row["way"] == BASE)
    base = next((torch.tensor(own, dtype=torch.float64) for own in kept), None)
    there = {row["way"] for row in known}
    for name, way in tqdm(ways.items(), subject.name, disable=None, leave=False):
        if name not in there:
            divergence, bits = drawn(subject, way, 1 if name in _ORDERLESS else draws)
            base = divergence.mean(0) if base is None else base
            yield {"model": subject.name, **row_of(name, divergence, bits, base)}


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
    for data, few in (("16 ids", ids[:1]), ("one token", ids[:1, :1].expand_as(ids))):
        found[f"int4 normal g64, {data}"] = our_way(_options("normal", 64), h(few))
    moments = cache(partial(second_moments, subject, subject.text))
    for levels in ("normal", "uniform"):
        found[f"int4 {levels} g64, gptq"] = gptq_way(_options(levels, 64), text, moments)
    found["int8 g128"] = our_way({"bits": 8, "granularity": 128})
    present = [b for b in BASELINES if missing(b.package) is None]
    found |= {b.name: their_way(b.quantizer) for b in present}
    return found | ({FILE: file_way()} if subject.name == "gemma" else {})


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


def subject_of(name: str, size: str) -> Subject:
    if name == "gemma":
        return gemma_subject()
    return minilm_subject() if name == "MiniLM" else trained_subject(name, size)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", choices=SIZES, default="small", help="of the small models")
    parser.add_argument("--way", default="", metavar="REGEX", help="only those it is found in")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows there are kept")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> Results:
    """Everything that the arguments ask for, and what the file has."""
    results = Results.of(arguments, torch.device("cpu"))
    if arguments.json and arguments.json.exists():
        results.add(*json.loads(arguments.json.read_text(encoding="utf-8"))["rows"])
    absent = {b.name: missing(b.package) for b in BASELINES}
    results.leave_out(*(f"{name}: {why}" for name, why in absent.items() if why))
    for name in arguments.model:
        why = gemma_missing() if name == "gemma" else None
        if why is not None:
            results.leave_out(f"{name}: {why}")
            continue
        subject = subject_of(name, arguments.size)
        ways = {n: w for n, w in ways_of(subject).items() if n == BASE or _asked(n, arguments)}
        known = [row for row in results.rows if row["model"] == name]
        for row in draw_rows(subject, ways, arguments.draws, known):
            results.add(row)
    return results


def _asked(name: str, arguments: argparse.Namespace) -> bool:
    return re.search(arguments.way, name) is not None


def main(argv: Sequence[str] | None = None) -> None:
    show(run(parse(argv)), draws_section)


if __name__ == "__main__":
    main()
