"""Tuning plots: each candidate's fraction of the roofline, and the choice's time over the best."""

import math
from collections.abc import Sequence
from html import escape

from fqcompile.kernels.tuning.table import Timing
from fqcompile.report.page import Axis, Point, axis_over, paragraph, points_svg
from fqcompile.report.tuning_case import Candidate, TuningCase

_MOST_LABELS = 12


def case_query(number: int) -> str:
    """The filter text for the candidates of one case; cases are numbered from 1."""
    return f"^{number}."


def plots_html(cases: Sequence[TuningCase], choice: str) -> str:
    """Both plots, with cases from left to right in the order measured, layers shaded in turn."""
    shares = _share_plot(cases)
    if not shares:
        return "<p>nothing has a time</p>"
    ratios = _ratio_plot(cases, choice)
    keys = (
        '<span class="key best"></span>the best, and candidates within its spread '
        '<span class="key slower"></span>slower '
        f'<span class="key square"></span>{escape(choice)}'
    )
    note = paragraph("lines reach from the 20th to the 80th percentile", "quiet")
    return f'<div class="plots">{shares}\n{ratios}</div>\n<p class="quiet">{keys}</p>\n{note}'


def _share_plot(cases: Sequence[TuningCase]) -> str:
    points = [
        _share_point(case, number, candidate, candidate.timing)
        for number, case in enumerate(cases, start=1)
        # The best and the choice are drawn last, so that they are on top.
        for candidate in sorted(
            case.candidates, key=lambda one: (one.name == case.best, one.name == case.choice)
        )
        if candidate.timing is not None
    ]
    if not points:
        return ""
    y = axis_over("% of the roofline", [*_ends(points), 100.0], from_zero=True)
    best = [100 * case.share(case.timed[case.best]) for case in cases if case.best]
    label = (
        f"share of the roofline of {len(points)} candidates in {len(cases)} cases: "
        f"the best reach {min(best):.0f} to {max(best):.0f} %"
    )
    return points_svg(points, _cases_axis(cases), y, label, _bands(cases))


def _share_point(case: TuningCase, number: int, candidate: Candidate, timing: Timing) -> Point:
    share = case.share(timing)
    spread = tuple(100 * case.ideal_us / us for us in (timing.high, timing.low))
    return Point(
        x=number,
        y=100 * share,
        title=f"{case.name}\n{candidate.name}\n{timing} µs, {share:.0%} of the roofline",
        css="slower" if case.standing(candidate) == "slower" else "best",
        square=candidate.name == case.choice,
        span=(spread[0], spread[1]),
        query=case_query(number),
    )


def _ratio_plot(cases: Sequence[TuningCase], choice: str) -> str:
    points = [
        point
        for number, case in enumerate(cases, start=1)
        if (point := _ratio_point(case, number)) is not None
    ]
    if not points:
        return ""
    y = axis_over(f"time of the {choice} over the best's", [*_ends(points), 1.0])
    worst = max(points, key=lambda point: point.y)
    label = (
        f"time of the {choice} over that of the best in {len(points)} cases: at the most "
        f"{worst.y:.2f}"
    )
    return points_svg(points, _cases_axis(cases), y, label, _bands(cases))


def _ratio_point(case: TuningCase, number: int) -> Point | None:
    ratio, best, chosen = case.choice_over_best, case.best_timing, case.choice_timing
    if ratio is None or best is None or chosen is None:
        return None
    unit = best.microseconds
    return Point(
        x=number,
        y=ratio,
        title=f"{case.name}\n{case.choice}: {ratio:.2f} times {case.best}'s time, {case.verdict}",
        css="slower" if case.verdict == "slower" else "best",
        square=True,
        span=(chosen.low / unit, chosen.high / unit),
        query=case_query(number),
    )


def _ends(points: Sequence[Point]) -> list[float]:
    return [end for point in points for end in point.span or (point.y,)]


def _cases_axis(cases: Sequence[TuningCase]) -> Axis:
    every = math.ceil(len(cases) / _MOST_LABELS) or 1
    ticks = [(float(number), f"{case.spec.m}") for number, case in enumerate(cases, start=1)]
    return Axis("rows, layer by layer", 0.5, len(cases) + 0.5, tuple(ticks[::every]))


def _bands(cases: Sequence[TuningCase]) -> list[tuple[float, float]]:
    """Every other run of cases of one layer."""
    starts = [i for i in range(len(cases)) if i == 0 or cases[i].layer != cases[i - 1].layer]
    ends = [*starts[1:], len(cases)]
    runs = [(start + 0.5, end + 0.5) for start, end in zip(starts, ends, strict=True)]
    return runs[::2]
