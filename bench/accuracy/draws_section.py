"""The section of `bench draws`: divergences, and their ratios to int4 as it was."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from bench.core.results import Row
from bench.core.section import Content, left_out, paragraphs, table

_ABREAST = 3  # models in a table
_PLAIN, _GPTQ = "int4 normal g64", "gptq"


def draws(content: Content) -> str:
    """What is measured, and a table for each three models."""
    rows: list[Row] = content["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    what = (
        "Divergence of predictions from the unquantized model's, nats per token (MiniLM: 1 - "
        "cosine): the mean over draws of which weights share a scale. The ratio is that to "
        f"{rows[0]['way']}, its interval a paired bootstrap over documents."
    )
    tables = (_table(rows, models[i : i + _ABREAST]) for i in range(0, len(models), _ABREAST))
    return paragraphs(what, *tables, _calibrated(rows), left_out(content))


def _calibrated(rows: Sequence[Row]) -> str:
    """What calibration does to the levels alone, draw by draw, as both have the same orders."""
    own = {(row["model"], row["way"]): row["draws"] for row in rows}
    lines = []
    for (model, way), draws in own.items():
        plain = own.get((model, _PLAIN), [])
        if way.startswith(f"{_PLAIN}, ") and _GPTQ not in way and len(plain) == len(draws) > 1:
            ratios = [one / other for one, other in zip(draws, plain, strict=True)]
            error = stdev(ratios) / sqrt(len(ratios))
            lines.append(
                (model, way.removeprefix(f"{_PLAIN}, "), f"{fmean(ratios):.3f} ({error:.3f})")
            )
    if not lines:
        return ""
    what = (
        f"Calibrated beside not calibrated, {_PLAIN}: the mean ratio over draws (standard error)."
    )
    kinds = list(dict.fromkeys(kind for _, kind, _ in lines))
    cells = {(model, kind): ratio for model, kind, ratio in lines}
    models = dict.fromkeys(model for model, _, _ in lines)
    body = [[model, *(cells.get((model, kind), "") for kind in kinds)] for model in models]
    return paragraphs(what, table(body, ("model", *kinds)))


def _table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """A line for each way: for each model its ratio to the first way, and the divergence."""
    ways: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["model"] in models:
            ways.setdefault(row["way"], {})[row["model"]] = row
    lines = [
        [way, _bits(found), *(cell for m in models for cell in _cells(found.get(m)))]
        for way, found in ways.items()
    ]
    headers = (text for m in models for text in (f"{m}: ratio [95 %]", "divergence (sd of draws)"))
    return table(lines, ("way", "bits/weight", *headers))


def _bits(found: dict[str, Row]) -> str:
    """Of all models, from the least to the most where they differ."""
    bits = sorted({f"{row['bits_per_weight']:.2f}" for row in found.values()})
    return " to ".join(dict.fromkeys((bits[0], bits[-1])))


def _cells(row: Row | None) -> Sequence[str]:
    if row is None:
        return "", ""
    ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
    spread = f"{row['spread']:.4f}" if len(row["draws"]) > 1 else "one"
    return ratio, f"{row['divergence']:.4f} ({spread})"
