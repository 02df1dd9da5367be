"""The plan: which weights are quantized, how, and why others are not; as text, JSON and HTML."""

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from fqcompile.config import FineQuantConfig
from fqcompile.files.trusted import replace_text
from fqcompile.report.granularity_map import map_html, place_of
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
from fqcompile.report.plots import errors_html
from fqcompile.report.site import (
    Site,
    format_mib,
    format_shape,
    format_sizes,
    reason_of,
    reasons_of,
    site_page_table,
    site_table,
)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sizes of all sites; bits per weight (including scales) and mean error of quantized sites."""

    sites: int
    quantized: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float | None
    mean_relative_error: float | None

    @classmethod
    def of(cls, sites: Sequence[Site]) -> Self:
        done = [s for s in sites if s.status == "quantized"]
        weights = sum(s.num_weights for s in done)
        errors = [s.relative_error for s in done if s.relative_error is not None]
        return cls(
            sites=len(sites),
            quantized=len(done),
            bytes_before=sum(s.bytes_before for s in sites),
            bytes_after=sum(s.bytes_after for s in sites),
            bits_per_weight=8 * sum(s.bytes_after for s in done) / weights if weights else None,
            mean_relative_error=sum(errors) / len(errors) if errors else None,
        )

    def facts(self) -> list[tuple[str, str]]:
        """The totals for a page: pairs of a figure and its description."""
        smaller = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        sizes = format_sizes(self.bytes_before, self.bytes_after)
        facts = [
            (f"{self.quantized} of {self.sites}", "sites quantized"),
            (sizes, f"of weights, {smaller:.1f} times smaller"),
        ]
        if self.bits_per_weight is not None:
            facts.append((f"{self.bits_per_weight:.2f}", "bits per quantized weight"))
        if self.mean_relative_error is not None:
            facts.append((f"{self.mean_relative_error:.4f}", "mean relative error"))
        return facts

    def __str__(self) -> str:
        sizes = f"{format_mib(self.bytes_before)} → {format_mib(self.bytes_after)} MiB"
        text = f"quantized {self.quantized} of {self.sites} sites: {sizes}"
        if self.bits_per_weight is not None:
            text += f", {self.bits_per_weight:.2f} bits per quantized weight"
        if self.mean_relative_error is not None:
            text += f", mean error {self.mean_relative_error:.4f}"
        return text


@dataclass(frozen=True)
class Plan:
    """The sites of a graph or model in order: all, `quantized`, `kept`; `totals` and `options`."""

    sites: tuple[Site, ...]
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def quantized(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.status == "quantized")

    @property
    def kept(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.status == "kept")

    @property
    def totals(self) -> Totals:
        return Totals.of(self.sites)

    def site(self, name: str) -> Site:
        """The site with this parameter name; KeyError if there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        close = difflib.get_close_matches(name, [s.name for s in self.sites], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"this plan has no site {name!r} among its {len(self.sites)}{hint}")

    def kept_lines(self) -> list[str]:
        """The reasons of the kept sites, most common first, each with its count."""
        return [f"kept {len(sites)}: {reason}" for reason, sites in reasons_of(self.kept)]

    def expert_lines(self) -> list[str]:
        """One line about the errors of single experts, if there are stacks of experts."""
        stacks = [(s, s.expert_errors) for s in self.quantized if s.expert_errors]
        if not stacks:
            return []
        worst, errors = max(stacks, key=lambda stack: max(stack[1]))
        least = min(min(errors) for _, errors in stacks)
        return [
            f"experts: {sum(len(e) for _, e in stacks)} in {len(stacks)} stacks, errors "
            f"{least:.4f} to {max(errors):.4f}; the worst is expert {errors.index(max(errors))} of "
            f"{worst.name}"
        ]

    def method_lines(self) -> list[str]:
        """How many weights got codes by GPTQ, and why others were rounded; none without it."""
        done = [site.calibration or "" for site in self.quantized]
        refused = Counter(text.rpartition("no gptq: ")[2] for text in done if "no gptq: " in text)
        made = sum("; gptq" in text for text in done)
        if not made and not refused:
            return []
        reasons = [f"rounded {count}: {reason}" for reason, count in refused.most_common()]
        return [f"gptq: {made} of {len(done)} weights", *reasons]

    def notes(self) -> list[str]:
        """The lines below the table: totals, methods, experts, why sites are kept."""
        lines = [*self.method_lines(), *self.expert_lines(), *self.kept_lines()]
        return [str(self.totals), *lines]

    def __str__(self) -> str:
        return "\n".join([site_table(self.sites), "", *self.notes()])

    def as_dict(self) -> dict[str, object]:
        return {
            "totals": asdict(self.totals),
            "options": dict(self.options),
            "sites": [site.as_dict() for site in self.sites],
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as one self-contained HTML page, and return its path."""
        options = Section("options", options_html(self.options, {}))
        sections = [*plan_sections(self.sites), options]
        page = render_page("fqcompile plan", [], self.totals.facts(), sections)
        return replace_text(path, page)


def plan_sections(sites: Sequence[Site]) -> list[Section]:
    """The sections that dry runs and compilations share; none if there are no sites."""
    if not sites:
        return []
    kept = [site for site in sites if site.status == "kept"]
    done = [site for site in sites if site.status == "quantized"]
    return [
        Section("sizes", table_html(_sizes(sites))),
        Section("granularity map", map_html(sites)),
        Section("errors", errors_html(done)),
        Section("kernels", _kernels_html(done)),
        Section("kept, and why", _kept_html(kept)),
        Section("sites", table_html(site_page_table(sites))),
    ]


def options_html(options: Mapping[str, object], versions: Mapping[str, str]) -> str:
    """Every option, the ones that differ from the default first, and the versions."""
    defaults = FineQuantConfig().as_dict()
    changed = [name for name, value in options.items() if value != defaults.get(name)]
    rows = tuple(
        (Cell(name), Cell(str(options[name])), Cell(str(defaults.get(name, ""))))
        for name in [*changed, *(name for name in options if name not in changed)]
    )
    said = ", ".join(f"{name}={options[name]!r}" for name in changed)
    parts = [paragraph(f"unlike the defaults: {said or 'nothing'}")]
    if rows:
        table = table_html(Table("options", ("option", "value", "default"), rows))
        parts.append(details(f"all {len(rows)} options", table))
    if versions:
        parts.append(paragraph(", ".join(f"{name} {text}" for name, text in versions.items())))
    return "\n".join(parts)


def _grouped(
    sites: Iterable[Site], key: Callable[[Site], str], weight: Callable[[list[Site]], float]
) -> list[tuple[str, list[Site]]]:
    """The sites grouped by key, the heaviest group first."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return sorted(groups.items(), key=lambda group: -weight(group[1]))


def _before(sites: Iterable[Site]) -> int:
    return sum(site.bytes_before for site in sites)


def _after(sites: Iterable[Site]) -> int:
    return sum(site.bytes_after for site in sites)


def _sizes(sites: Sequence[Site]) -> Table:
    """A row for each role: the size of its weights before and after."""
    groups = _grouped(sites, lambda site: place_of(site.name).role, _before)
    largest = max((_before(group) for _, group in groups), default=0) or 1
    rows = tuple(
        (
            Cell(role, query=place_of(group[0].name).role_query),
            Cell(str(len(group)), len(group)),
            Cell(format_mib(_before(group)), _before(group)),
            Cell(format_mib(_after(group)), _after(group)),
            _mean_bits(group),
            Cell("", _before(group), shares=(_before(group) / largest, _after(group) / largest)),
        )
        for role, group in groups
    )
    headers = ("role", "sites", "MiB before", "MiB after", "bits per weight", "after, over before")
    return Table("sizes", headers, rows)


def _mean_bits(sites: Sequence[Site]) -> Cell:
    weights = sum(site.num_weights for site in sites)
    bits = 8 * _after(sites) / weights if weights else 0.0
    return Cell(f"{bits:.2f}", bits)


def _least(sites: Iterable[Site]) -> float:
    return sum(site.least_us or 0.0 for site in sites)


def _kernels_html(sites: Sequence[Site]) -> str:
    """The chosen kernels, each with its share of the total roofline lower bound."""
    if not sites:
        return "<p>none: nothing is quantized</p>"
    groups = _grouped(sites, lambda site: site.kernel or "none yet", lambda g: _least(g) or len(g))
    whole = _least(sites)
    rows = tuple(
        (
            Cell(kernel, query=kernel if group[0].kernel else ""),
            Cell(str(len(group)), len(group)),
            Cell(format_mib(_after(group)), _after(group)),
            *_least_cells(group, whole),
        )
        for kernel, group in groups
    )
    headers = ("kernel", "sites", "MiB of weights", "lower bound µs", "share", "of the lower bound")
    table = table_html(Table("kernels", headers, rows))
    unknown = sum(site.least_us is None for site in sites)
    notes = [
        "lower bound µs: the roofline lower bound for the rows of the example call: the time to "
        "move the bytes on this device or, on a GPU, the time to compute if that is longer"
    ]
    if unknown:
        notes.append(f"not known for {unknown} of {len(sites)} sites")
    return "\n".join([table, *(paragraph(note, "quiet") for note in notes)])


def _least_cells(sites: Sequence[Site], whole: float) -> tuple[Cell, Cell, Cell]:
    least = _least(sites)
    if all(site.least_us is None for site in sites):
        return Cell("not known"), Cell(""), Cell("")
    share = least / whole if whole else 0.0
    bar = Cell("", share, shares=(1.0, share))
    return Cell(f"{least:,.1f}", least), Cell(f"{share:.0%}", share), bar


def _kept_html(sites: Sequence[Site]) -> str:
    """The skipped sites by reason, collapsed, the most common reason first."""
    if not sites:
        return "<p>nothing: every weight that was looked at is quantized</p>"
    return "\n".join(
        details(
            f"{len(group)} {'site' if len(group) == 1 else 'sites'}, "
            f"{format_mib(_after(group))} MiB: {reason}",
            unordered(
                f"{site.name}, {format_shape(site.shape)}"
                + ("" if reason_of(site) == reason else f": {reason_of(site)}")
                for site in group
            ),
        )
        for reason, group in reasons_of(sites)
    )
