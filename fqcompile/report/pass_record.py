"""One pass over a graph, as a report keeps it, and as a part of the page."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape

from fqcompile.report.html import Cell, Table, details, paragraph, table_html, unordered
from fqcompile.report.table import shorten

# A graph's signature is one line of many kilobytes, beside which nothing else could be read.
LONGEST_LINE = 240


@dataclass(frozen=True)
class PassRecord:
    """One pass over the graph: what it matched, how many changes, and the graph on both sides.

    `before` and `after` are the readable graph, or None where no dump was asked for.
    """

    name: str
    seconds: float
    count: int
    matched: tuple[str, ...] = ()
    before: str | None = field(default=None, repr=False)
    after: str | None = field(default=None, repr=False)

    @cached_property
    def diff(self) -> tuple[str, ...]:
        """The lines of a unified diff of the graph, without its header; none without both sides."""
        if self.before is None or self.after is None:
            return ()
        sides = self.before.splitlines(), self.after.splitlines()
        return tuple(difflib.unified_diff(*sides, lineterm=""))[2:]

    def as_dict(self) -> dict[str, object]:
        """Without the graphs, which are files of the dump."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "count": self.count,
            "matched": list(self.matched),
        }


def passes_html(passes: Sequence[PassRecord], total_seconds: float) -> str:
    """Times and changes of all passes, then what each matched and changed, folded away."""
    longest = max((p.seconds for p in passes), default=0.0) or 1.0
    rows = tuple(
        (
            Cell(p.name),
            Cell(str(p.count), p.count),
            Cell(f"{p.seconds:.3f}", p.seconds),
            Cell("", p.seconds, shares=(1.0, p.seconds / longest)),
        )
        for p in passes
    )
    spent = sum(p.seconds for p in passes)
    return "\n".join(
        [
            table_html(Table("passes", ("pass", "count", "seconds", "of the longest"), rows)),
            paragraph(f"the passes took {spent:.2f} of {total_seconds:.2f} s", "quiet"),
            *(part for p in passes for part in _pass_details(p)),
        ]
    )


def _pass_details(record: PassRecord) -> list[str]:
    parts = []
    if record.matched:
        summary = f"{record.name} matched {len(record.matched)}"
        parts.append(details(summary, unordered(record.matched)))
    if record.diff:
        added, removed = (sum(line.startswith(sign) for line in record.diff) for sign in "+-")
        summary = f"{record.name} changed the graph: +{added} −{removed} lines"
        parts.append(details(summary, _diff_html(record)))
    return parts


_DIFF_CSS = {"+": "added", "-": "removed", "@": "place"}


def _diff_html(record: PassRecord) -> str:
    lines = "\n".join(map(_diff_line, record.diff))
    name = escape(f"graph diff of {record.name}")
    cut = any(len(line) > LONGEST_LINE for line in record.diff)
    note = paragraph("lines cut at … are whole in the dump's .diff file", "quiet") if cut else ""
    return f'<pre class="diff" tabindex="0" role="region" aria-label="{name}">{lines}</pre>{note}'


def _diff_line(line: str) -> str:
    text = escape(shorten(line, LONGEST_LINE))
    css = _DIFF_CSS.get(line[:1])
    return f'<span class="{css}">{text}</span>' if css else text
