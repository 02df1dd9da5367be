"""One self-contained HTML page: light and dark, no network, and no script but its own.

Its pieces have all text escaped: sections, sortable tables, cells with a bar or a filter. Drawings
are inline SVG, whose horizontal places are percentages and vertical ones pixels, so that one takes
any width while its text keeps its size.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple, Self

HEIGHT = 220
_GAP = 0.04  # margin beyond the values, as a fraction of their range


@dataclass(frozen=True)
class Point:
    """One mark: `span` is the range of values it stands for, `css` the class that styles it.

    `label` is written beside the mark where there is room, and otherwise when it is pointed at.
    """

    x: float
    y: float
    title: str
    css: str
    square: bool = False
    span: tuple[float, float] | None = None
    query: str = ""
    label: str = ""


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high`, and those named."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """The position of a value on the axis, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def axis_over(title: str, values: Sequence[float], *, from_zero: bool = False) -> Axis:
    """An axis slightly longer than the range of values, with ticks at 1, 2 or 5 times 10^n."""
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
    """Bars over each other, each a fraction of the whole width, the later in a stronger color.

    A share above one ends at the whole width, in the color of what does not fit.
    """
    bars = "".join(
        f'<rect class="{"over" if share > 1 else f"bar{number}"}" width="{_percent(share)}"'
        ' height="8" rx="2"/>'
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
    label = f' data-label="{escape(point.label)}"' if point.label else ""
    title = f"<title>{escape(point.title)}</title>"
    return f'<g class="point {point.css}"{query}{label}>{title}{span}{shape}</g>'


class Cell(NamedTuple):
    """The text of a cell, and the number to sort by if the text would sort wrongly.

    `query` makes the text a button that filters the sites by it; `shares` are fractions of one,
    drawn as bars over each other, the longest first. `bad` is the color of what does not fit.
    """

    text: str
    value: float | None = None
    query: str = ""
    shares: tuple[float, ...] = ()
    bad: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table; every row has as many cells as there are headers.

    `filterable` gives it a box to filter its rows by: the page has at most one such table.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    filterable: bool = False

    def without_empty(self) -> Self:
        """The table without the columns whose cells have no text, in any row."""
        said = [i for i, _ in enumerate(self.headers) if any(row[i].text for row in self.rows)]
        rows = tuple(tuple(row[i] for i in said) for row in self.rows)
        return replace(self, headers=tuple(self.headers[i] for i in said), rows=rows)


class Section(NamedTuple):
    """A part of the page with an entry in the table of contents; `body` is markup."""

    title: str
    body: str


def filter_button(text: str, query: str, spoken: str = "") -> str:
    """A button that filters the table of sites by `query`."""
    label = f' aria-label="{escape(spoken)}"' if spoken else ""
    return (
        f'<button type="button" class="filter" data-query="{escape(query)}"{label}>'
        f"{escape(text)}</button>"
    )


def details(summary: str, body: str) -> str:
    """A collapsed part; `summary` is text, `body` is markup."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def paragraph(text: str, css: str = "") -> str:
    name = f' class="{css}"' if css else ""
    return f"<p{name}>{escape(text)}</p>"


def scroll_box(body: str, label: str) -> str:
    """Markup that may be wider than the page, in a box that scrolls, with the keyboard too."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'
    )


def table_html(table: Table) -> str:
    """The table in a box of its own; a click on a header sorts by its column."""
    heads = "".join(_head(header, cells) for header, cells in _columns(table))
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    body = f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f"{_FILTER if table.filterable else ''}{scroll_box(body, table.title)}"


def _columns(table: Table) -> Iterable[tuple[str, list[Cell]]]:
    return ((header, [row[i] for row in table.rows]) for i, header in enumerate(table.headers))


def _head(header: str, cells: Iterable[Cell]) -> str:
    number = ' class="number"' if any(_is_number(cell) for cell in cells) else ""
    button = f'<button type="button">{escape(header)}</button>'
    return f'<th scope="col" aria-sort="none"{number}>{button}</th>'


def _is_number(cell: Cell) -> bool:
    return cell.value is not None and bool(cell.text)


def unordered(items: Iterable[str]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _cell(cell: Cell) -> str:
    names = [name for name, on in (("number", _is_number(cell)), ("bad", cell.bad)) if on]
    css = f' class="{" ".join(names)}"' if names else ""
    value = "" if cell.value is None else f' data-value="{cell.value}"'
    text = filter_button(cell.text, cell.query) if cell.query else escape(cell.text)
    return f"<td{css}{value}>{text}{share_bar(cell.shares) if cell.shares else ''}</td>"


_FILTER = """\
<div class="filters"><input type="search" placeholder="filter: words that all occur, ^start of name"
aria-label="filter rows: words that must all occur; ^ stands for the start of the name">
<button type="button" class="clear">show all</button> <output></output></div>
"""


def render_page(
    title: str, notes: Sequence[str], facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> str:
    """The page; `notes` are warnings, `facts` are pairs of a figure and its description."""
    script = _part("page.js")
    return Template(_part("page.html")).substitute(
        title=escape(title),
        style=_part("page.css"),
        script=script,
        script_hash=_hash(script),
        notes="\n".join(paragraph(note, "warning") for note in notes),
        facts="".join(
            f"<div><dt>{escape(what)}</dt><dd>{escape(figure)}</dd></div>" for figure, what in facts
        ),
        contents="\n".join(
            f'<li><a href="#{_anchor(section)}">{escape(section.title)}</a></li>'
            for section in sections
        ),
        sections="\n".join(map(_section, sections)),
    )


def _section(section: Section) -> str:
    anchor = _anchor(section)
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{escape(section.title)}</h2>\n{section.body}\n</section>'
    )


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title)


@cache
def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The hash by which the browser identifies the only script it may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
