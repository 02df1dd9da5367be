"""How much each way of quantizing loses, averaged over draws of which weights share a scale.

    python -m bench draws [--model gemma MiniLM ...] [--way REGEX] [--draws 6] [--json FILE]

One rounding is one draw: another order of the input channels changes nothing but which weights
share a scale, and moves a small model's divergence by a tenth. So each way quantizes the same
matrices in the same orders, the first of them the model's own, and ways are compared by the mean.
Both spreads are given: over draws, and over documents (a bootstrap in which a way is paired with
`BASE`).

Rows that the file has already are not measured again; each has its commit.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor
from tqdm import tqdm

from bench.accuracy.draws_section import draws as draws_section
from bench.accuracy.others import BASELINES
from bench.accuracy.packaged import PACKAGED, packaged_absent, packaged_subject
from bench.accuracy.rows import interval
from bench.accuracy.subjects import Subject, gemma_subject, minilm_subject, trained_subject
from bench.accuracy.train_lm import FAMILIES, SIZES
from bench.accuracy.ways import BASE, ORDERLESS, PEERS, Way, ways_of
from bench.core.results import Results, Row, commit, missing
from bench.core.section import show
from fqcompile.demo.gemma import gemma_missing

DRAWS = 6
# Of the models of packages, unless others are asked for: the default and what it is held against.
_FEW = r"^int4 normal (g64(, (synthetic|text|gptq))?|adaptive, synthetic)$|^(hqq|nf4|torchao)"
MODELS = "gemma", "MiniLM", *PACKAGED, *FAMILIES


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
            divergence, bits = drawn(subject, way, 1 if name in ORDERLESS else draws)
            base = divergence.mean(0) if base is None else base
            yield {"model": subject.name, **row_of(name, divergence, bits, base)}


def subject_of(name: str, size: str) -> Subject:
    if name == "gemma":
        return gemma_subject()
    if name in PACKAGED:
        return packaged_subject(name)
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
    absent = {b.name: missing(b.package) for b in BASELINES if b.name in PEERS}
    results.leave_out(*(f"{name}: {why}" for name, why in absent.items() if why))
    order: dict[str, int] = {}
    for name in arguments.model:
        why = _absent(name)
        if why is not None:
            results.leave_out(f"{name}: {why}")
            continue
        subject = subject_of(name, arguments.size)
        every = ways_of(subject)
        for way in every:
            order.setdefault(way, len(order))
        asked = arguments.way or (_FEW if name in PACKAGED else "")
        ways = {n: way for n, way in every.items() if n == BASE or re.search(asked, n)}
        known = [row for row in results.rows if row["model"] == name]
        for row in draw_rows(subject, ways, arguments.draws, known):
            results.add(row)
    results.rows.sort(key=lambda r: (MODELS.index(r["model"]), order.get(r["way"], len(order))))
    results.write()
    return results


def _absent(model: str) -> str | None:
    """Why a model cannot be had, or None."""
    if model == "gemma":
        return gemma_missing()
    return packaged_absent(model) if model in PACKAGED else None


def main(argv: Sequence[str] | None = None) -> None:
    show(run(parse(argv)), draws_section)


if __name__ == "__main__":
    main()
