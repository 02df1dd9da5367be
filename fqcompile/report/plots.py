"""The plots of reports, and what they say in words and tables.

plan     relative errors against bits per weight and in model order, and the worst experts
tuning   each candidate's fraction of the roofline, and the choice's time over the best
"""

import math
from collections.abc import Sequence
from html import escape

from fqcompile.kernels.tuning.table import Timing
from fqcompile.report.granularity_map import place_of
from fqcompile.report.page import (
    Axis,
    Cell,
    Point,
    Table,
    axis_over,
    paragraph,
    points_svg,
    table_html,
)
from fqcompile.report.site import Site, format_error, format_group, format_status, shorten
from fqcompile.report.tuning_case import Candidate, TuningCase

WORST = 10
_MOST_LAYERS_NAMED = 8
_MOST_CASES_NAMED = 12
_LONGEST_LABEL = 28


def errors_html(sites: Sequence[Site]) -> str:
    """Both plots of the sites with a known error, and a table of the worst experts, if any."""
    known = [site for site in sites if _is_known(site)]
    if not known:
        return "<p>no quantized weight has a known error: there is none, or they came packed</p>"
    plots = f'<div class="plots">{_bits_plot(known)}\n{_order_plot(known)}</div>\n{_legend(known)}'
    worst = worst_experts(known)
    if not worst.rows:
        return plots
    return f"{plots}\n<h3>{worst.title}</h3>\n{table_html(worst)}"


def _is_known(site: Site) -> bool:
    error = site.relative_error
    return site.num_weights > 0 and error is not None and math.isfinite(error)


def bits_per_weight(site: Site) -> float:
    """Bits of codes and scales per weight."""
    return 8 * site.bytes_after / site.num_weights


def worst_experts(sites: Sequence[Site]) -> Table:
    """The experts with the largest errors over all stacks, worst first."""
    experts = [
        (error, number, site)
        for site in sites
        for number, error in enumerate(site.expert_errors or ())
    ]
    worst = sorted(experts, key=lambda expert: -expert[0])[:WORST]
    rows = tuple(
        (
            Cell(f"{error:.4f}", error),
            Cell(str(number), number),
            Cell(site.name, query=f"^{site.name}"),
            Cell(format_error(site.relative_error), site.relative_error),
        )
        for error, number, site in worst
    )
    headers = ("error", "expert", "stack", "error of the stack")
    return Table(f"worst {len(rows)} of {len(experts)} experts", headers, rows)


def _legend(sites: Sequence[Site]) -> str:
    formats = sorted({(site.bits or 0, format_status(site)) for site in sites})
    keys = "".join(f'<span class="key bits{bits}"></span>{escape(name)} ' for bits, name in formats)
    if any(site.kind == "experts" for site in sites):
        keys += '<span class="key square"></span>a stack of experts, from its best to its worst'
    return f'<p class="quiet">{keys}</p>'


def _errors_axis(sites: Sequence[Site]) -> Axis:
    highest = [max(s.expert_errors or (0.0,)) for s in sites]
    return axis_over("relative error", [*_errors(sites), *highest], from_zero=True)


def _errors(sites: Sequence[Site]) -> list[float]:
    return [s.relative_error or 0.0 for s in sites]


def _words(sites: Sequence[Site], what: str) -> str:
    worst = max(sites, key=lambda s: s.relative_error or 0.0)
    errors = _errors(sites)
    return (
        f"relative error {what} of {len(sites)} sites: {min(errors):.4f} to {max(errors):.4f}, "
        f"the largest of {worst.name}"
    )


def _point(site: Site, x: float) -> Point:
    error = site.relative_error or 0.0
    experts = site.expert_errors
    title = (
        f"{site.name}\nerror {error:.4f}, {format_status(site)} {format_group(site)}, "
        f"{bits_per_weight(site):.2f} bits per weight"
    )
    if experts:
        title += f"\n{len(experts)} experts, {min(experts):.4f} to {max(experts):.4f}"
    return Point(
        x=x,
        y=error,
        title=title,
        css=f"bits{site.bits}",
        square=site.kind == "experts",
        span=(min(experts), max(experts)) if experts else None,
        query=f"^{site.name}",
        label=_label(site),
    )


def _label(site: Site) -> str:
    place = place_of(site.name)
    layer = "" if place.layer is None else f"{place.layer} "
    return shorten(f"{layer}{place.role}", _LONGEST_LABEL)


def _bits_plot(sites: Sequence[Site]) -> str:
    bits = [bits_per_weight(site) for site in sites]
    axis = axis_over("bits per weight, scales counted", bits)
    points = [_point(site, x) for site, x in zip(sites, bits, strict=True)]
    label = _words(sites, "against bits per weight")
    return points_svg(points, axis, _errors_axis(sites), label)


def _order_plot(sites: Sequence[Site]) -> str:
    starts = _layer_starts(sites)
    every = math.ceil(len(starts) / _MOST_LAYERS_NAMED) or 1
    ticks = tuple(((left + right) / 2, name) for left, right, name in starts[::every])
    axis = Axis("layer, sites in model order", -0.5, len(sites) - 0.5, ticks)
    points = [_point(site, i) for i, site in enumerate(sites)]
    bands = [(left, right) for left, right, _ in starts[::2]]
    label = _words(sites, "in model order")
    return points_svg(points, axis, _errors_axis(sites), label, bands)


def _layer_starts(sites: Sequence[Site]) -> list[tuple[float, float, str]]:
    """Where each run of sites of one layer begins and ends, with the layer's number."""
    runs: list[tuple[float, float, str]] = []
    previous: tuple[str, int | None] | None = None
    for i, site in enumerate(sites):
        place = place_of(site.name)
        if (place.stack, place.layer) == previous:
            runs[-1] = (runs[-1][0], i + 0.5, runs[-1][2])
        else:
            runs.append((i - 0.5, i + 0.5, "" if place.layer is None else str(place.layer)))
        previous = place.stack, place.layer
    return runs


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
        label=shorten(candidate.name, _LONGEST_LABEL),
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
        label=shorten(case.name, _LONGEST_LABEL),
    )


def _ends(points: Sequence[Point]) -> list[float]:
    return [end for point in points for end in point.span or (point.y,)]


def _cases_axis(cases: Sequence[TuningCase]) -> Axis:
    every = math.ceil(len(cases) / _MOST_CASES_NAMED) or 1
    ticks = [(float(number), f"{case.spec.m}") for number, case in enumerate(cases, start=1)]
    return Axis("rows, layer by layer", 0.5, len(cases) + 0.5, tuple(ticks[::every]))


def _bands(cases: Sequence[TuningCase]) -> list[tuple[float, float]]:
    """Every other run of cases of one layer."""
    starts = [i for i in range(len(cases)) if i == 0 or cases[i].layer != cases[i - 1].layer]
    ends = [*starts[1:], len(cases)]
    runs = [(start + 0.5, end + 0.5) for start, end in zip(starts, ends, strict=True)]
    return runs[::2]
