"""Pieces of a page, all text escaped: sections, sortable tables, cells with a bar or a filter."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from fqcompile.report.svg import share_bar


class Cell(NamedTuple):
    """What a cell shows, and the number it sorts by where the text would sort wrongly.

    `query` makes the text a button that filters the sites by it; `shares` are fractions of one,
    drawn as bars over each other, the longest first.
    """

    text: str
    value: float | None = None
    query: str = ""
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A titled table; every row has as many cells as there are headers.

    `filterable` gives it a box to filter its rows by: the page has at most one such table.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    filterable: bool = False


class Section(NamedTuple):
    """A part of the page that its contents name; `body` is markup."""

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
    """A part that is folded away; `summary` is text, `body` markup."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def paragraph(text: str, css: str = "") -> str:
    name = f' class="{css}"' if css else ""
    return f"<p{name}>{escape(text)}</p>"


def scroll_box(body: str, label: str) -> str:
    """Markup that may be wider than the page: it scrolls alone, and by the keyboard too."""
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
    number = ' class="number"' if _is_number(cell) else ""
    value = "" if cell.value is None else f' data-value="{cell.value}"'
    text = filter_button(cell.text, cell.query) if cell.query else escape(cell.text)
    return f"<td{number}{value}>{text}{share_bar(cell.shares) if cell.shares else ''}</td>"


_FILTER = """\
<div class="filters"><input type="search" placeholder="filter: words that all occur, ^start of name"
aria-label="filter rows: words that must all occur; ^ stands for the start of the name">
<button type="button" class="clear">show all</button> <output></output></div>
"""
