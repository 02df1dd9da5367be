"""The report of one compiled graph: its plan, its passes, warnings and versions.

The newest reports of the process are stored in order, for `fqcompile.reports()`.
"""

import difflib
import json
import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fqcompile.files.trusted import replace_text
from fqcompile.report.page import (
    Cell,
    Section,
    Table,
    details,
    paragraph,
    render_page,
    table_html,
    unordered,
)
from fqcompile.report.plan import Plan, options_html, plan_sections
from fqcompile.report.site import Site, shorten

# A graph's signature is one line of many kilobytes, which would hide everything else.
LONGEST_LINE = 240
_DIFF_CSS = {"+": "added", "-": "removed", "@": "place"}


def installed_version(name: str) -> str:
    """A package's version; a checkout on PYTHONPATH has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class PassRecord:
    """One pass over the graph: its matches, the number of changes, and the graph before and after.

    `before` and `after` are the graph as code, or None if no dump was requested.
    """

    name: str
    seconds: float
    count: int
    matched: tuple[str, ...] = ()
    before: str | None = field(default=None, repr=False)
    after: str | None = field(default=None, repr=False)

    @cached_property
    def diff(self) -> tuple[str, ...]:
        """The lines of a unified diff of the graph, without the header; empty without a dump."""
        if self.before is None or self.after is None:
            return ()
        sides = self.before.splitlines(), self.after.splitlines()
        return tuple(difflib.unified_diff(*sides, lineterm=""))[2:]

    def as_dict(self) -> dict[str, object]:
        """As a dict, without the graphs, which the dump stores as files."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "count": self.count,
            "matched": list(self.matched),
        }


def passes_html(passes: Sequence[PassRecord], total_seconds: float) -> str:
    """Times and change counts of all passes, then collapsed lists of matches and graph diffs."""
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


@dataclass(frozen=True)
class CompileReport:
    """The report of one graph, from capture to the inner compiler.

    Identical layers may share one graph. Its plan has a row for each weight that a call passed in
    for an input that can be quantized, under that weight's own name; rows appear with the first
    call that passes the weight. A graph without such inputs lists the weights it was compiled with.

    Attributes:
        graph: its name.
        plan: a row for each weight.
        passes: each pass with its seconds and the number of its changes.
        warnings: what the log was told while it was compiled.
        versions: of fqcompile, torch and what else took part.
        total_seconds: from the captured graph to the compiled one, quantization included.
    """

    graph: str
    plan: Plan
    passes: tuple[PassRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    total_seconds: float = 0.0

    @property
    def sites(self) -> tuple[Site, ...]:
        """The rows of the plan."""
        return self.plan.sites

    @property
    def least_ms(self) -> float | None:
        """Roofline lower bound of the quantized matmuls in ms; None if it is known for none."""
        least = [site.least_us for site in self.sites if site.least_us is not None]
        return sum(least) / 1e3 if least else None

    def _facts(self) -> list[tuple[str, str]]:
        least = self.least_ms
        known = [] if least is None else [(f"{least:.3g} ms", "lower bound of quantized matmuls")]
        return [*known, (f"{self.total_seconds:.2f} s", "to compile")]

    def _notes(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        title = f"graph {self.graph}, {self.total_seconds:.2f} s"
        warnings = [f"warning: {text}" for text in self.warnings]
        least = self.least_ms
        bound = f"roofline lower bound of the quantized matmuls: {least or 0:.3g} ms"
        roofline = [] if least is None else [bound]
        return [f"{title} ({versions})" if versions else title, *roofline, *warnings]

    def __str__(self) -> str:
        rows = [(p.name, p.count, f"{p.seconds:.3f}") for p in self.passes]
        passes = tabulate(rows, ("pass", "count", "seconds"), disable_numparse=True)
        return "\n".join([*self._notes(), "", *([passes, ""] if rows else []), str(self.plan)])

    def as_dict(self) -> dict[str, object]:
        return {
            "graph": self.graph,
            "total_seconds": self.total_seconds,
            "versions": dict(self.versions),
            "warnings": list(self.warnings),
            "passes": [p.as_dict() for p in self.passes],
            "plan": self.plan.as_dict(),
        }

    def to_json(self) -> str:
        """The report as a JSON object, without the graphs."""
        return json.dumps(self.as_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one self-contained HTML page, and return its path."""
        passes = passes_html(self.passes, self.total_seconds)
        sections = [
            *plan_sections(self.sites),
            *([Section("passes", passes)] if self.passes else []),
            Section("options and versions", options_html(self.plan.options, self.versions)),
        ]
        facts = [*self.plan.totals.facts(), *self._facts()]
        title = f"fqcompile {self.graph}"
        return replace_text(path, render_page(title, self.warnings, facts, sections))


log = logging.getLogger("fqcompile")
_NOTHING_COMPILED = (
    "there are no reports: finequant has compiled no graph in this process. What "
    "torch.compile(model, backend='finequant') returns compiles when it is called itself; its "
    "other methods, such as generate(), run the model as it was. "
    "model.compile(backend='finequant') compiles in place, for these too, and "
    "fqcompile.quantize_(model) needs no compiler"
)
MOST_REPORTS = 256
_REPORTS: deque[CompileReport] = deque(maxlen=MOST_REPORTS)


def record(report: CompileReport) -> None:
    """Append a report to those of this process; the oldest is dropped beyond the limit."""
    _REPORTS.append(report)


def amend(report: CompileReport, **changes: Any) -> CompileReport:
    """Replace the report by a copy with these changes, at the same position, and return it."""
    new = replace(report, **changes)
    for index, known in enumerate(list(_REPORTS)):
        if known is report and _REPORTS[index] is report:
            _REPORTS[index] = new
    return new


def recorded() -> list[CompileReport]:
    """The reports of this process, at most 256, newest last."""
    return list(_REPORTS)


def reports() -> list[CompileReport]:
    """The reports of the graphs most recently compiled in this process, at most 256, newest last.

    Each is a snapshot: call `reports()` again to see layers that ran the same graph since.
    With `debug_dir` or TORCH_TRACE each holds its graph before and after every pass, as text. If
    the list is empty, a warning explains possible causes.
    """
    if not _REPORTS:
        log.warning(_NOTHING_COMPILED)
    return recorded()


def clear_reports() -> None:
    """Forget the reports of this process."""
    _REPORTS.clear()
