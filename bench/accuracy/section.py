"""The sections of `bench accuracy`: what quantization costs trained models, beside other libraries.

Losses and divergences are in thousandths of a bit per byte.
"""

from collections.abc import Iterable, Sequence

from bench.accuracy import table as accuracy_table
from bench.accuracy.targets import (
    ADAPTIVE,
    COLUMN,
    FIXED,
    INT8,
    NAIVE_COLUMN,
    RANGE,
    Verdict,
    verdicts,
)
from bench.core.results import Row
from bench.core.section import Content, figures, left_out, paragraphs, table

_MILLI = 1000
_OURS = (INT8, ADAPTIVE, RANGE, *reversed(FIXED), NAIVE_COLUMN)
_OUTLIERS = (ADAPTIVE, RANGE, COLUMN, NAIVE_COLUMN)
_EMBEDDINGS = "embeddings"
# A study that results have and no run repeats: group sizes matrix by matrix, chosen with data.
KNOWN = "int4 sensitivities known"


def accuracy_short(content: Content) -> str:
    """The ways that matter on every model, what outliers do, which targets are missed."""
    rows = _reported(content["rows"])
    drawn = figures(content)
    about = content["settings"].get("baselines", "")
    what = (
        "Loss, and divergence of the predictions from fp32's, in thousandths of a bit per byte "
        f"({_sizes(rows)}). With losses this small chance decides; the divergence tells ways "
        f"apart.{f' Libraries: {_once(about)}.' if about else ''}"
    )
    return paragraphs(
        what, _main_table(rows), _outlier_table(rows), _targets(rows), _allocation(rows),
        drawn.get("pareto", ""), left_out(content),
    )  # fmt: skip


def accuracy(content: Content) -> str:
    """Every table of the benchmark, every target, every figure."""
    rows: list[Row] = content["rows"]
    told = [f"{r['model']} {r['part']} {r['way']}: {r['failure']}" for r in rows if "failure" in r]
    parts = [
        f"Not reported: {'; '.join(told)}." if told else "",
        _block(accuracy_table.fp32_table(rows)),
        _block(accuracy_table.quality_table(rows, "quality")),
        "With outliers put into the weights:",
        _block(accuracy_table.quality_table(rows, "outliers")),
        _block(accuracy_table.verdict_table(verdicts(_reported(rows)))),
        _block(accuracy_table.error_table(rows)),
        _block(accuracy_table.sensitivity_table(rows)),
        _block(accuracy_table.allocation_table(rows)),
        _block(accuracy_table.embedding_table(rows)),
        *figures(content).values(),
        left_out(content),
    ]
    return paragraphs(*parts)


def _block(text: str) -> str:
    return f"```\n{text}\n```" if text.strip() else ""


def _reported(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "failure" not in row]


def _once(names: str) -> str:
    return ", ".join(dict.fromkeys(names.split(", ")))


def _sizes(rows: Sequence[Row]) -> str:
    """ "opt 4.1, llama 4.3 million parameters"."""
    told = [f"{r['model']} {r['training']['parameters'] / 1e6:.1f}" for r in _part(rows, "fp32")]
    return f"{', '.join(told)} million parameters"


def _part(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _by_way(rows: Iterable[Row], part: str) -> dict[str, dict[str, Row]]:
    """{way: {model: row}}."""
    found: dict[str, dict[str, Row]] = {}
    for row in _part(rows, part):
        found.setdefault(row["way"], {})[row["model"]] = row
    return found


def _models(rows: Iterable[Row], part: str) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in _part(rows, part)))


def _main_table(rows: Sequence[Row]) -> str:
    """A line for each way, a column for each model; ours first, libraries by their bits."""
    ways, models = _by_way(rows, "quality"), _models(rows, "quality")
    sentences = _by_way(rows, _EMBEDDINGS)
    others = [way for way, found in ways.items() if not any("bits" in r for r in found.values())]
    others.sort(key=lambda way: (way.split()[0], _mean_bits(ways[way])))
    shown = [way for way in _OURS if way in ways] + others
    lines = []
    for way in shown:
        cells = [_cell(ways[way].get(model)) for model in models]
        embedding = next(iter(sentences.get(way, {}).values()), None)
        lines.append([way, f"{_mean_bits(ways[way]):.2f}", *cells, *_embedding_cells(embedding)])
    headers = ("way", "bits/weight", *(f"{m}: loss / divergence" for m in models))
    return table(lines, (*headers, "MiniLM: cosine", "same neighbor"))


def _mean_bits(found: dict[str, Row]) -> float:
    return float(sum(row["bits_per_weight"] for row in found.values())) / len(found)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{_MILLI * row['loss']:.2f} / {_MILLI * row['divergence']:.2f}"


def _embedding_cells(row: Row | None) -> list[str]:
    return ["", ""] if row is None else [f"{row['cosine']:.4f}", f"{row['same_neighbor']:.1%}"]


def _outlier_table(rows: Sequence[Row]) -> str:
    ways, models = _by_way(rows, "outliers"), _models(rows, "outliers")
    shown = [way for way in _OUTLIERS if way in ways]
    if not shown:
        return ""
    lines = [
        [way, *(f"{_MILLI * ways[way][m]['loss']:.1f}" if m in ways[way] else "" for m in models)]
        for way in shown
    ]
    what = "Loss of the same models with outliers put into their weights, which compute the same:"
    return paragraphs(what, table(lines, ("way", *models)))


def _targets(rows: Sequence[Row]) -> str:
    """How many are met; which are not, on which models, where it is not the loss that decides."""
    asked = [v for v in verdicts(rows) if v.met is not None]
    if not asked:
        return ""
    by_loss = [v for v in asked if "'s loss below" in v.target]
    missed: dict[str, dict[str, list[str]]] = {}
    for verdict in asked:
        if not verdict.met and verdict not in by_loss:
            noise = " within the noise" if "noise" in verdict.note else ""
            what, _, limit = verdict.target.partition(" below ")
            where = missed.setdefault(what, {}).setdefault(limit, [])
            where.append(f"{verdict.model}{noise}")
    text = f"{_met(asked)} targets are met"
    if by_loss:
        text += f"; of those that compare losses {_met(by_loss)}"
    return f"{text}. Missed beside those: {_missed(missed)}." if missed else f"{text}."


def _met(found: Sequence[Verdict]) -> str:
    return f"{sum(v.met is True for v in found)} of {len(found)}"


def _allocation(rows: Sequence[Row]) -> str:
    """What sizes matrix by matrix are worth, and what they would be if sensitivities were known."""
    ways = _by_way(rows, "allocation")
    if not ways:
        return ""
    less = {
        way: [1 - row["predicted"] / row["fixed_groups"] for row in found.values()]
        for way, found in ways.items()
    }
    told = {way: f"{min(parts):.1%} to {max(parts):.1%}" for way, parts in less.items()}
    rule, known = (told[way] for way in (ADAPTIVE, KNOWN))
    return (
        f"These matrices are alike: the rule's choice of sizes diverges {rule} less than one size "
        "for all at the same bits. Knowing how sensitive the model is to each matrix, which needs "
        f"data, would make that {known}."
    )


def _missed(missed: dict[str, dict[str, list[str]]]) -> str:
    """ "a's loss below b's (opt, llama), c's (opt); ..."."""
    told = []
    for what, limits in missed.items():
        places = [f"{limit} ({', '.join(where)})".strip() for limit, where in limits.items()]
        told.append(f"{what} below {', '.join(places)}" if "" not in limits else what + places[0])
    return "; ".join(told)
