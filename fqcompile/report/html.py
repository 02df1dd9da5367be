"""Tables as one self-contained HTML page: light and dark, sortable, filterable, no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import NamedTuple


class Cell(NamedTuple):
    """What a cell shows, and the number it sorts by where the text would sort wrongly."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A titled table; every row has as many cells as there are headers."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def _cell(cell: Cell) -> str:
    number = "" if cell.value is None else f' class="number" data-value="{cell.value}"'
    return f"<td{number}>{escape(cell.text)}</td>"


def _table(table: Table) -> str:
    heads = "".join(
        f'<th aria-sort="none"><button type="button">{escape(header)}</button></th>'
        for header in table.headers
    )
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{heads}</tr>'
        f"</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def render_page(title: str, notes: Sequence[str], tables: Sequence[Table]) -> str:
    """The page; `notes` are the lines between the title and the tables."""
    return _PAGE.substitute(
        title=escape(title),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        tables="\n".join(map(_table, tables)),
    )


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --soft: #f3f5f7;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14171a; --line: #343a41; --soft: #1f2429; --link: #7db8f5; }
}
body { margin: 2rem; color: var(--ink); background: var(--paper);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } p { margin: .2rem 0; }
input { margin-top: 1rem; padding: .4rem .6rem; width: min(26rem, 100%); font: inherit;
  color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td.number { text-align: right; white-space: nowrap; }
tbody tr:hover { background: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; white-space: nowrap;
  color: var(--link); }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
</style>
</head>
<body>
<h1>$title</h1>
$notes
<input type="search" placeholder="filter rows" aria-label="filter rows">
<output></output>
$tables
<script>
const rows = [...document.querySelectorAll("tbody tr")];
const filter = document.querySelector("input");
const count = document.querySelector("output");

function show() {
  const words = filter.value.toLowerCase().split(/\\s+/);
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
  }
  count.textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " rows";
}

function compare(a, b) {
  if (a.dataset.value && b.dataset.value) return a.dataset.value - b.dataset.value;
  return a.textContent.localeCompare(b.textContent, undefined, {numeric: true});
}

function sort(head) {
  const order = head.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of head.parentNode.children) other.ariaSort = "none";
  head.ariaSort = order;
  const body = head.closest("table").tBodies[0];
  const column = head.cellIndex, sign = order === "ascending" ? 1 : -1;
  const sorted = [...body.rows].sort((a, b) => sign * compare(a.cells[column], b.cells[column]));
  body.append(...sorted);
}

filter.addEventListener("input", show);
for (const head of document.querySelectorAll("th")) {
  head.firstElementChild.addEventListener("click", () => sort(head));
}
show();
</script>
</body>
</html>
""")
