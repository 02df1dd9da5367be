"""The section of `bench draws`: divergences, and their ratios to int4 as it was."""

from collections.abc import Sequence

from bench.core.results import Row
from bench.core.section import Content, left_out, paragraphs, table

_ABREAST = 3  # models in a table


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
    return paragraphs(what, *tables, left_out(content))


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
