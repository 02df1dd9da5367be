"""A tuning report: the cases of one run and the machine; as text, JSON and HTML page."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from fqcompile.files.trusted import replace_text
from fqcompile.kernels.tuning.table import Timing
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
from fqcompile.report.plots import case_query, plots_html
from fqcompile.report.tuning_case import Candidate, TuningCase, doubts, summary

SUFFIXES = (".json", ".html")


@dataclass(frozen=True)
class TuningReport:
    """The results of tuning.

    Attributes:
        about: the conditions of the times: device, versions, command, mode; written unchanged.
        choice: the name of the candidate used without measuring: "heuristic".
        notes: how times were measured, and caveats, one sentence each.
        left_out: matmuls that were not measured, with the reason.
    """

    cases: Sequence[TuningCase]
    about: Mapping[str, object]
    choice: str = "heuristic"
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()

    def __str__(self) -> str:
        """The table, a summary of the choice, then every refusal and problem."""
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
        """Write one self-contained HTML page, and return its path."""
        sections = tuning_sections(self.cases, self.choice, self.about, self.notes, self.left_out)
        facts = tuning_facts(self.cases, self.choice)
        return replace_text(path, render_page("fqcompile tune", self._warnings(), facts, sections))

    def write(self, path: Path) -> Path:
        """Write JSON or an HTML page, by the file's suffix, which is one of SUFFIXES."""
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
    """A line for each refused candidate and reason, with the cases it applies to."""
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


def tuning_facts(cases: Sequence[TuningCase], choice: str) -> list[tuple[str, str]]:
    """The figures at the top, each with its description."""
    timed = sum(len(case.timed) for case in cases)
    refused = sum(len(case.refused) for case in cases)
    facts = [
        (str(len(cases)), "cases: a matmul at a number of rows"),
        (str(timed), "candidates measured, each after its result was checked"),
        (str(refused), "candidates refused"),
    ]
    shares = [case.share(best) for case in cases if (best := case.best_timing) is not None]
    if shares:
        facts.append((f"{min(shares):.0%} to {max(shares):.0%}", "of the roofline, by the best"))
    judged = [case for case in cases if case.verdict is not None]
    if judged:
        lost = sum(case.verdict == "slower" for case in judged)
        facts.append((f"{lost} of {len(judged)}", f"cases where the {choice} is slower"))
        worst = max(case.choice_over_best or 0.0 for case in judged)
        facts.append((f"{worst:.2f}x", f"the most that the {choice} takes of the best's time"))
    return facts


def tuning_sections(
    cases: Sequence[TuningCase],
    choice: str,
    about: Mapping[str, object],
    notes: Sequence[str],
    left_out: Sequence[str],
) -> list[Section]:
    """All sections; without cases, only how times were measured."""
    how = Section("how it was measured", _how_html(about, notes, left_out))
    if not cases:
        return [how]
    return [
        Section("best of each case", _cases_html(cases, choice)),
        Section("plots", plots_html(cases, choice)),
        Section("refusals", _refusals_html(cases)),
        Section("candidates", table_html(candidates_table(cases, choice))),
        how,
    ]


def _cases_html(cases: Sequence[TuningCase], choice: str) -> str:
    headers = (
        *("case", "layer", "rows", "best", "µs", "spread", "of the roofline"),
        *(choice, f"{choice}, µs", "over the best", "verdict", "ideal µs", "tried"),
    )
    rows = tuple(_case_row(number, case) for number, case in enumerate(cases, start=1))
    table = table_html(Table("best of each case", headers, rows))
    again = any(case.final for case in cases)
    note = "times of the best and over the best are of a second measurement, both in turn"
    return "\n".join(
        [paragraph(summary(cases, choice)), table, *([paragraph(note, "quiet")] if again else [])]
    )


def _case_row(number: int, case: TuningCase) -> tuple[Cell, ...]:
    best, chosen, refused = case.best_timing, case.choice_timing, len(case.refused)
    tried = len(case.candidates)
    return (
        Cell(f"{number}.", number, query=case_query(number)),
        Cell(case.layer),
        Cell(case.rows, case.spec.m),
        Cell(case.best or "none"),
        _number(best.microseconds if best else None, "{:,.1f}"),
        _number(best.spread if best else None, "{:.1%}"),
        _number(case.share(best) if best else None, "{:.0%}"),
        Cell(case.choice or "none"),
        _number(chosen.microseconds if chosen else None, "{:,.1f}"),
        _number(case.choice_over_best, "{:.2f}x"),
        Cell(case.verdict or ""),
        _number(case.ideal_us, "{:,.1f}"),
        Cell(f"{tried}, {refused} refused" if refused else f"{tried}", tried),
    )


def _number(value: float | None, form: str) -> Cell:
    return Cell("") if value is None else Cell(form.format(value), value)


CANDIDATE_HEADERS = (
    *("case", "layer", "rows", "candidate", "µs", "p20", "p80", "spread", "of the roofline"),
    *("over the best", "what it is"),
)


def candidates_table(cases: Sequence[TuningCase], choice: str) -> Table:
    """All candidates, in the order tried."""
    rows = tuple(
        _candidate_row(number, case, candidate, choice)
        for number, case in enumerate(cases, start=1)
        for candidate in case.candidates
    )
    return Table("candidates", CANDIDATE_HEADERS, rows, filterable=True)


def _candidate_row(
    number: int, case: TuningCase, candidate: Candidate, choice: str
) -> tuple[Cell, ...]:
    timing = candidate.timing
    words = [
        standing if (standing := case.standing(candidate)) != "slower" else "",
        choice if candidate.name == case.choice else "",
        "" if candidate.refusal is None else f"refused: {candidate.refusal}",
    ]
    return (
        Cell(f"{number}.", number),
        Cell(case.layer),
        Cell(case.rows, case.spec.m),
        Cell(candidate.name),
        _number(timing.microseconds if timing else None, "{:,.1f}"),
        _number(timing.low if timing else None, "{:,.1f}"),
        _number(timing.high if timing else None, "{:,.1f}"),
        _number(timing.spread if timing else None, "{:.1%}"),
        _number(case.share(timing) if timing else None, "{:.0%}"),
        _number(_over_best(case, timing) if timing else None, "{:.2f}x"),
        Cell(", ".join(filter(None, words))),
    )


def _over_best(case: TuningCase, timing: Timing) -> float:
    assert case.best is not None, "one has a time"
    return timing.microseconds / case.timed[case.best].microseconds


def _refusals_html(cases: Sequence[TuningCase]) -> str:
    """Refused candidates by reason, collapsed, the most common reason first."""
    places: dict[str, list[str]] = {}
    for case in cases:
        for candidate in case.refused:
            reason = candidate.refusal or "no reason recorded"
            places.setdefault(reason, []).append(f"{candidate.name}: {case.name}")
    if not places:
        return "<p>none: every candidate has a time</p>"
    ordered = sorted(places.items(), key=lambda place: -len(place[1]))
    return "\n".join(details(f"{len(where)} × {why}", unordered(where)) for why, where in ordered)


def _how_html(about: Mapping[str, object], notes: Sequence[str], left_out: Sequence[str]) -> str:
    rows = tuple((Cell(name), Cell(str(value))) for name, value in _flat(about))
    parts = [*(paragraph(note) for note in notes), table_html(Table("about", ("what", "is"), rows))]
    if left_out:
        parts.append(details(f"left out: {len(left_out)}", unordered(left_out)))
    return "\n".join(parts)


def _flat(about: Mapping[str, object]) -> list[tuple[str, object]]:
    """A flat copy: entries of nested mappings are moved to the top level."""
    found: list[tuple[str, object]] = []
    for name, value in about.items():
        found += list(value.items()) if isinstance(value, Mapping) else [(name, value)]
    return found
