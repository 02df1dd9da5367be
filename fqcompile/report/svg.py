"""Drawings as inline SVG: bars, and points over ticks.

Horizontal places are percentages and vertical ones pixels, so a drawing takes any width while its
text keeps its size.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

HEIGHT = 220
_GAP = 0.04  # what is left free beyond the values, as a share of their range


@dataclass(frozen=True)
class Point:
    """One mark: `span` is the least and largest value behind it, `css` says how it looks."""

    x: float
    y: float
    title: str
    css: str
    square: bool = False
    span: tuple[float, float] | None = None
    query: str = ""


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high`, and those named."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Where a value lies on the axis, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def axis_over(title: str, values: Sequence[float], *, from_zero: bool = False) -> Axis:
    """An axis a little longer than the values reach, with ticks at one, two or five times 10^n."""
    low, high = (0.0 if from_zero else min(values)), max(values)
    gap = _GAP * (high - low or abs(high) or 1.0)
    low, high = (low if from_zero else low - gap), high + gap
    step = _round_step((high - low) / 5)
    decimals = max(0, -math.floor(math.log10(step)))
    named = range(math.ceil(low / step), math.floor(high / step) + 1)
    return Axis(title, low, high, tuple((i * step, f"{i * step:.{decimals}f}") for i in named))


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)


def points_svg(
    points: Sequence[Point], x: Axis, y: Axis, label: str, bands: Iterable[tuple[float, float]] = ()
) -> str:
    """The points over their axes; `bands` shade parts of x, `label` says it all in words."""
    marks = "\n".join(
        [
            *(_band(x, *band) for band in bands),
            *(_y_tick(y, *tick) for tick in y.ticks),
            *(_x_tick(x, *tick) for tick in x.ticks),
            *(_mark(x, y, point) for point in points),
        ]
    )
    return (
        f"<figure><figcaption>{escape(y.title)} <span>↑</span> · {escape(x.title)} <span>→</span>"
        f'</figcaption>\n<svg class="plot" role="img" aria-label="{escape(label)}">\n{marks}\n'
        "</svg></figure>"
    )


def share_bar(shares: Sequence[float]) -> str:
    """Bars over each other, each a fraction of the whole width, the later in a stronger colour."""
    bars = "".join(
        f'<rect class="bar{number}" width="{_percent(share)}" height="8" rx="2"/>'
        for number, share in enumerate(shares)
    )
    return f'<svg class="bar" aria-hidden="true">{bars}</svg>'


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _height(axis: Axis, value: float) -> str:
    return f"{HEIGHT * (1 - axis.share(value)):.1f}"


def _band(x: Axis, left: float, right: float) -> str:
    width = _percent(x.share(right) - x.share(left))
    start = _percent(x.share(left))
    return f'<rect class="band" x="{start}" y="0" width="{width}" height="{HEIGHT}"/>'


def _y_tick(y: Axis, value: float, text: str) -> str:
    at = _height(y, value)
    return (
        f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
        f'<text x="-6" y="{at}" dy=".32em" text-anchor="end">{escape(text)}</text>'
    )


def _x_tick(x: Axis, value: float, text: str) -> str:
    at = _percent(x.share(value))
    return f'<text x="{at}" y="{HEIGHT + 16}" text-anchor="middle">{escape(text)}</text>'


def _mark(x: Axis, y: Axis, point: Point) -> str:
    left, top = _percent(x.share(point.x)), _height(y, point.y)
    shape = (
        f'<rect x="{left}" y="{top}" width="8" height="8" transform="translate(-4,-4)"/>'
        if point.square
        else f'<circle cx="{left}" cy="{top}" r="4"/>'
    )
    span = ""
    if point.span is not None:
        low, high = (_height(y, value) for value in point.span)
        span = f'<line x1="{left}" x2="{left}" y1="{low}" y2="{high}"/>'
    query = f' data-query="{escape(point.query)}"' if point.query else ""
    title = f"<title>{escape(point.title)}</title>"
    return f'<g class="point {point.css}"{query}>{title}{span}{shape}</g>'
