"""A tuning report: the cases of one run with what they were measured on; as text, JSON and page."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from fqcompile.files.replace import replace_text
from fqcompile.report.page import render_page
from fqcompile.report.tuning_case import TuningCase, doubts, summary
from fqcompile.report.tuning_page import tuning_facts, tuning_sections

SUFFIXES = (".json", ".html")


@dataclass(frozen=True)
class TuningReport:
    """What tuning found.

    Attributes:
        about: what the times hold for: device, versions, command, mode; written out as it is.
        choice: what is taken without measuring, in words: "closed form".
        notes: how it was measured and what to keep in mind, a sentence each.
        left_out: what was not measured, with the reason.
    """

    cases: Sequence[TuningCase]
    about: Mapping[str, object]
    choice: str = "closed form"
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()

    def __str__(self) -> str:
        """The table, what the choice lost, then every refusal and problem."""
        return "\n".join([*self._table(), *self._remarks()])

    def _table(self) -> list[str]:
        headers = ("case", "rows", "best", "us [p20, p80]", "of ideal", self.choice, "takes")
        rows = [_row(case) for case in self.cases]
        if not rows:
            return []
        table = tabulate(rows, (*headers, "tried"), disable_numparse=True)
        return [table, summary(self.cases, self.choice)]

    def _remarks(self) -> list[str]:
        return [
            *_refusals(self.cases),
            *self._warnings(),
            *(f"left out: {text}" for text in self.left_out),
        ]

    def _warnings(self) -> list[str]:
        problems = [f"{case.name}: {case.problem}" for case in self.cases if case.problem]
        return [*problems, *doubts(self.cases)]

    def as_dict(self) -> dict[str, object]:
        about = {**self.about, "choice": self.choice, "left_out": list(self.left_out)}
        return {**about, "cases": [case.as_dict() for case in self.cases]}

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one page that needs nothing else, and return its path."""
        sections = tuning_sections(self.cases, self.choice, self.about, self.notes, self.left_out)
        facts = tuning_facts(self.cases, self.choice)
        return replace_text(path, render_page("fqcompile tune", self._warnings(), facts, sections))

    def write(self, path: Path) -> Path:
        """As JSON or as a page, by the file's ending, which is one of SUFFIXES."""
        if path.suffix == ".html":
            return self.to_html(path)
        return replace_text(path, json.dumps(self.as_dict(), indent=2) + "\n")


def _row(case: TuningCase) -> tuple[str, ...]:
    timing, ratio, refused = case.best_timing, case.choice_over_best, len(case.refused)
    takes = "" if ratio is None else f"{ratio:.2f}x"
    return (
        case.layer,
        case.rows,
        case.best or "none",
        "" if timing is None else str(timing),
        "" if timing is None else f"{case.share(timing):.0%}",
        case.choice or "none",
        f"{takes}, within the spread" if case.verdict == "within the spread" else takes,
        f"{len(case.candidates)}" + (f", {refused} refused" if refused else ""),
    )


def _refusals(cases: Sequence[TuningCase]) -> list[str]:
    """A line for each refused candidate and reason, with the cases where it is so."""
    places: dict[tuple[str, str | None], list[TuningCase]] = {}
    for case in cases:
        for candidate in case.refused:
            places.setdefault((candidate.name, candidate.refusal), []).append(case)
    return [
        f"{_where(found, cases)}: {name} refused: {reason}"
        for (name, reason), found in places.items()
    ]


def _where(found: Sequence[TuningCase], cases: Sequence[TuningCase]) -> str:
    if len(found) == len(cases) > 1:
        return "all cases"
    layers: dict[str, list[str]] = {}
    for case in found:
        layers.setdefault(case.layer, []).append(case.rows)
    return "; ".join(", ".join([layer, *rows]) for layer, rows in layers.items())
