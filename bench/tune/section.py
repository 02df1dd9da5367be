"""The section of `bench tune`: what is taken without measuring, against the best."""

from collections.abc import Sequence

from bench.core.results import Row
from bench.core.section import Content, left_out, paragraphs, table

_SHOWN = 6
_HEADERS = ("layer", "rows", "best", "us [20th, 80th percentile]", "of ideal", "the choice",
            "takes", "refused")  # fmt: skip


def tune(content: Content) -> str:
    """Every case."""
    return _section(content, content["rows"])


def tune_short(content: Content) -> str:
    """Where the choice loses most; all cases are counted."""
    known = [row for row in content["rows"] if row["choice_over_best"] is not None]
    worst = sorted(known, key=lambda row: float(row["choice_over_best"]), reverse=True)
    return _section(content, worst[:_SHOWN], f"The {_SHOWN} cases where it loses most:")


def _section(content: Content, rows: Sequence[Row], which: str = "") -> str:
    lines = [_line(row) for row in rows]
    return paragraphs(_summary(content["rows"]), which, table(lines, _HEADERS), left_out(content))


def _summary(rows: Sequence[Row]) -> str:
    ratios = sorted(r["choice_over_best"] for r in rows if r["choice_over_best"] is not None)
    if not ratios:
        return "Nothing could be compared."
    slower = sum(row["verdict"] == "slower" for row in rows)
    return (
        f"What is taken without measuring against the best measured, {len(ratios)} cases: the "
        f"best or within the spread in {len(ratios) - slower}, in the median {_of(ratios):.2f} "
        f"times the best's time, at worst {ratios[-1]:.2f}."
    )


def _of(ordered: Sequence[float]) -> float:
    return ordered[len(ordered) // 2]


def _line(row: Row) -> list[str]:
    trials = {trial["config"]: trial for trial in row["trials"]}
    best = trials.get(row["best"], {})
    latest = row["final"].get(row["best"]) or best
    us = low = ""
    if latest:
        us, low = f"{latest['microseconds']:.1f}", f" [{latest['low']:.1f}, {latest['high']:.1f}]"
    share = f"{row['ideal_us'] / latest['microseconds']:.0%}" if latest else ""
    ratio = row["choice_over_best"]
    refused = sum("refusal" in trial for trial in trials.values())
    return [
        _layer(row),
        str(row["rows"]),
        row["best"] or "none",
        f"{us}{low}",
        share,
        row["choice"] or "none",
        "" if ratio is None else f"{ratio:.2f}x",
        f"{refused} of {len(trials)}",
    ]


def _layer(row: Row) -> str:
    stack = f"{row['experts']} x " if row["experts"] else ""
    ends = [word for word in ("gated" if row["gated"] else "", row["routing"] or "") if word]
    formats = f"int{row['bits']} g{row['group_size']} {row['dtype']}"
    return " ".join([f"{stack}{row['n']} x {row['k']}", formats, *ends])
