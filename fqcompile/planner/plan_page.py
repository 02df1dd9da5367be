"""Estimates as one page: throughput against latency, memory as bars, every figure."""

from collections.abc import Sequence

from fqcompile.planner.estimate import Estimate
from fqcompile.planner.plan_table import seconds_of_a_token
from fqcompile.planner.speed import Speed
from fqcompile.report.html import Cell, Section, Table, paragraph, table_html, unordered
from fqcompile.report.page import render_page
from fqcompile.report.svg import Axis, Point, axis_over, points_svg

_GB = 1e9
_HEADERS = (
    *("GPU", "GPUs", "tp", "ep", "batch", "context", "weights in", "weights GB", "KV GB"),
    *("other GB", "of what is usable", "decode tok/s", "ms per token", "communication"),
    *("prefill tok/s", "µs per token", "communication", "cost of 1M decoded", "of 1M read"),
)


def plan_page(estimates: Sequence[Estimate], assumed: Sequence[str]) -> str:
    """The page's text."""
    models: dict[str, list[Estimate]] = {}
    for estimate in estimates:
        models.setdefault(estimate.model.name, []).append(estimate)
    sections = [Section(name, _model_html(found)) for name, found in models.items()]
    sections.append(Section("assumptions", unordered(assumed)))
    fit = sum(estimate.fits for estimate in estimates)
    facts = [
        (str(len(estimates)), "combinations"),
        (str(fit), "of them fit"),
        ("by arithmetic", "nothing here was measured"),
    ]
    return render_page("fqcompile plan", [], facts, sections)


def _model_html(found: Sequence[Estimate]) -> str:
    parts = []
    running = [(e, e.decode) for e in found if e.decode is not None]
    if running:
        parts.append(f'<div class="plots">{_plot(running)}</div>')
        parts.append(_legend(found))
    else:
        parts.append(paragraph("none of these ways fits"))
    possible = [estimate for estimate in found if estimate.refusal is None]
    if possible:
        rows = tuple(_cells(estimate) for estimate in possible)
        parts.append(table_html(Table(found[0].model.name, _HEADERS, rows)))
    refused = dict.fromkeys(estimate.refusal for estimate in found if estimate.refusal)
    if refused:
        parts.append(unordered(reason for reason in refused if reason))
    return "\n".join(parts)


def _legend(found: Sequence[Estimate]) -> str:
    names = {estimate.form.bits: estimate.form.name for estimate in found}
    keys = "".join(f'<span class="key bits{bits}"></span>{name} ' for bits, name in names.items())
    return f'<p class="quiet">{keys}</p>'


def _plot(running: Sequence[tuple[Estimate, Speed]]) -> str:
    """Decoding: what a sequence waits for a token, against what each GPU makes a second."""
    waits = [1e3 * seconds_of_a_token(*pair) for pair in running]
    rates = [e.tokens_per_second(speed) / e.gpus for e, speed in running]
    points = [
        Point(x, y, _words(e, x, y), f"bits{e.form.bits}")
        for (e, _), x, y in zip(running, waits, rates, strict=True)
    ]
    best = max(points, key=lambda point: point.y)
    return points_svg(
        points,
        _from_zero("milliseconds per token", waits),
        _from_zero("decoded tokens per second and GPU", rates),
        f"decoding, {len(points)} ways; the most tokens per GPU: {best.title}",
    )


def _from_zero(title: str, values: Sequence[float]) -> Axis:
    return axis_over(title, values, from_zero=True)


def _words(estimate: Estimate, wait: float, rate: float) -> str:
    sharing, load = estimate.sharing, estimate.load
    return (
        f"{estimate.form.name} on {estimate.gpus} {estimate.device_name}, tp {sharing.tp}, "
        f"ep {sharing.ep}, batch {load.batch}, context {load.context}\n"
        f"{wait:.2f} ms per token, {rate:.1f} tokens per second and GPU"
    )


def _cells(estimate: Estimate) -> tuple[Cell, ...]:
    memory, sharing, load = estimate.memory, estimate.sharing, estimate.load
    assert memory is not None, "what is possible has its bytes"
    share = memory.total / memory.usable
    counts = (estimate.gpus, sharing.tp, sharing.ep, load.batch, load.context)
    sizes = (memory.weights, memory.kv, memory.activations)
    return (
        Cell(estimate.device_name),
        *(Cell(str(count), count) for count in counts),
        Cell(estimate.form.name),
        *(Cell(f"{size / _GB:.1f}", size) for size in sizes),
        Cell(f"{share:.0%}", share, shares=(1.0, share)),
        *_speed_cells(estimate, estimate.decode, 1e3),
        *_speed_cells(estimate, estimate.prefill, 1e6),
        _cost_cell(estimate, estimate.decode),
        _cost_cell(estimate, estimate.prefill),
    )


def _speed_cells(estimate: Estimate, speed: Speed | None, units: float) -> tuple[Cell, ...]:
    if speed is None:
        return Cell("does not fit"), Cell(""), Cell("")
    rate, wait = estimate.tokens_per_second(speed), units * seconds_of_a_token(estimate, speed)
    share = speed.communication_share
    return Cell(f"{rate:,.0f}", rate), Cell(f"{wait:.2f}", wait), Cell(f"{share:.0%}", share)


def _cost_cell(estimate: Estimate, speed: Speed | None) -> Cell:
    cost = None if speed is None else estimate.cost_of_a_million(speed)
    return Cell("") if cost is None else Cell(f"{cost:.3f}", cost)
