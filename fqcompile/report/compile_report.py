"""What one compiled graph went through: its plan, its passes, warnings and versions.

Every report of the process is kept in order, for `fqcompile.reports()`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from fqcompile.report.files import replace_text
from fqcompile.report.html import Cell, Table, render_page
from fqcompile.report.plan import Plan
from fqcompile.report.site import Site
from fqcompile.report.table import site_page_table


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

    def as_dict(self) -> dict[str, object]:
        """Without the graphs, which are files of the dump."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "count": self.count,
            "matched": list(self.matched),
        }


@dataclass(frozen=True)
class CompileReport:
    """One graph, from capture to the call that compiled what was left of it."""

    graph: str
    plan: Plan
    passes: tuple[PassRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    total_seconds: float = 0.0

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.plan.sites

    def _notes(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        title = f"graph {self.graph}, {self.total_seconds:.2f} s"
        warnings = [f"warning: {text}" for text in self.warnings]
        least = [site.least_us for site in self.sites if site.least_us is not None]
        roofline = (
            [f"quantised matmuls take {sum(least) / 1e3:.3g} ms at the least"] if least else []
        )
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
        notes = [*self._notes(), *self.plan.notes()]
        tables = [site_page_table(self.sites), _pass_table(self.passes)]
        return replace_text(path, render_page(f"fqcompile {self.graph}", notes, tables))


def _pass_table(passes: tuple[PassRecord, ...]) -> Table:
    rows = tuple(
        (
            Cell(p.name),
            Cell(str(p.count), p.count),
            Cell(f"{p.seconds:.3f}", p.seconds),
            Cell(", ".join(p.matched)),
        )
        for p in passes
    )
    return Table("passes", ("pass", "count", "seconds", "matched"), rows)


_REPORTS: list[CompileReport] = []


def record(report: CompileReport) -> None:
    """Append a report to those of this process."""
    _REPORTS.append(report)


def reports() -> list[CompileReport]:
    """The report of every graph compiled in this process, newest last."""
    return list(_REPORTS)


def clear_reports() -> None:
    """Forget the reports of this process."""
    _REPORTS.clear()
