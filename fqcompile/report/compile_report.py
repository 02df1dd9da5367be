"""What one compiled graph went through: its plan, its passes, warnings and versions.

The newest reports of the process are kept in order, for `fqcompile.reports()`.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fqcompile.files.replace import replace_text
from fqcompile.report.html import Section
from fqcompile.report.page import render_page
from fqcompile.report.pass_record import PassRecord, passes_html
from fqcompile.report.plan import Plan
from fqcompile.report.plan_page import options_html, plan_sections
from fqcompile.report.site import Site


@dataclass(frozen=True)
class CompileReport:
    """One graph, from capture to the call that compiled what was left of it.

    Equal layers may run one graph. Its plan has a row for each weight that came in at a place where
    it may be quantised, as soon as a call has brought it, under its own name. Where a graph has no
    such place its rows are those of the weights that it was compiled with.
    """

    graph: str
    plan: Plan
    passes: tuple[PassRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    total_seconds: float = 0.0

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.plan.sites

    @property
    def least_ms(self) -> float | None:
        """What the quantised matmuls take at the least, where that is known of any."""
        least = [site.least_us for site in self.sites if site.least_us is not None]
        return sum(least) / 1e3 if least else None

    def _facts(self) -> list[tuple[str, str]]:
        least = self.least_ms
        known = [] if least is None else [(f"{least:.3g} ms", "least time of quantised matmuls")]
        return [*known, (f"{self.total_seconds:.2f} s", "to compile")]

    def _notes(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        title = f"graph {self.graph}, {self.total_seconds:.2f} s"
        warnings = [f"warning: {text}" for text in self.warnings]
        least = self.least_ms
        roofline = [] if least is None else [f"quantised matmuls take {least:.3g} ms at the least"]
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
        return json.dumps(self.as_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page that needs nothing else, and return its path."""
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
    """Append a report to those of this process, whose oldest goes where they are too many."""
    _REPORTS.append(report)


def amend(report: CompileReport, **changes: Any) -> CompileReport:
    """The report with these changes, which takes its place among those of this process."""
    new = replace(report, **changes)
    for index, known in enumerate(list(_REPORTS)):
        if known is report and _REPORTS[index] is report:
            _REPORTS[index] = new
    return new


def recorded() -> list[CompileReport]:
    """The reports of this process, 256 at most, newest last."""
    return list(_REPORTS)


def reports() -> list[CompileReport]:
    """The reports of the graphs that were compiled in this process last, 256 at most, newest last.

    Each is as of now: rows of further layers that run its graph are in one that is asked for later.
    With `debug_dir` or TORCH_TRACE each holds its graph before and after every pass, as text. Where
    there is none, a warning says why that may be.
    """
    if not _REPORTS:
        log.warning(_NOTHING_COMPILED)
    return recorded()


def clear_reports() -> None:
    """Forget the reports of this process."""
    _REPORTS.clear()
