"""Relative errors as plots, against bits per weight and in model order, and the worst experts."""

import math
from collections.abc import Sequence
from html import escape

from fqcompile.report.granularity_map import place_of
from fqcompile.report.page import Axis, Cell, Point, Table, axis_over, points_svg, table_html
from fqcompile.report.site import Site, format_error, format_group, format_status

WORST = 10
_MOST_LABELS = 8


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
    )


def _bits_plot(sites: Sequence[Site]) -> str:
    bits = [bits_per_weight(site) for site in sites]
    axis = axis_over("bits per weight, scales counted", bits)
    points = [_point(site, x) for site, x in zip(sites, bits, strict=True)]
    label = _words(sites, "against bits per weight")
    return points_svg(points, axis, _errors_axis(sites), label)


def _order_plot(sites: Sequence[Site]) -> str:
    starts = _layer_starts(sites)
    every = math.ceil(len(starts) / _MOST_LABELS) or 1
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
