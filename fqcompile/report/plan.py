"""The plan: what is quantised, how, and why the rest is not. Printed, as JSON and as a page."""

import difflib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from fqcompile.files.replace import replace_text
from fqcompile.report.html import Section
from fqcompile.report.page import render_page
from fqcompile.report.plan_page import options_html, plan_sections
from fqcompile.report.site import Site
from fqcompile.report.table import format_mib, format_sizes, site_table


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sizes over all sites; bits per weight (scales counted) and mean error of the quantised."""

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
        """The same for a page: figures, and what each one is."""
        smaller = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        sizes = format_sizes(self.bytes_before, self.bytes_after)
        facts = [
            (f"{self.quantized} of {self.sites}", "sites quantised"),
            (sizes, f"of weights, {smaller:.1f} times smaller"),
        ]
        if self.bits_per_weight is not None:
            facts.append((f"{self.bits_per_weight:.2f}", "bits per quantised weight"))
        if self.mean_relative_error is not None:
            facts.append((f"{self.mean_relative_error:.4f}", "mean relative error"))
        return facts

    def __str__(self) -> str:
        sizes = f"{format_mib(self.bytes_before)} → {format_mib(self.bytes_after)} MiB"
        text = f"quantised {self.quantized} of {self.sites} sites: {sizes}"
        if self.bits_per_weight is not None:
            text += f", {self.bits_per_weight:.2f} bits per quantised weight"
        if self.mean_relative_error is not None:
            text += f", mean error {self.mean_relative_error:.4f}"
        return text


@dataclass(frozen=True)
class Plan:
    """The sites of a model or a graph in the order met, and the options that led to them."""

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
        """The site of a parameter name."""
        for site in self.sites:
            if site.name == name:
                return site
        close = difflib.get_close_matches(name, [s.name for s in self.sites], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"this plan has no site {name!r} among its {len(self.sites)}{hint}")

    def kept_lines(self) -> list[str]:
        """The reasons of the kept sites in full, the commonest first, each with its count."""
        counts = Counter(s.reason or "no reason recorded" for s in self.kept)
        return [f"kept {count}: {reason}" for reason, count in counts.most_common()]

    def expert_lines(self) -> list[str]:
        """One line on the errors of single experts, where there are stacks of them."""
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

    def notes(self) -> list[str]:
        """What the table does not say: totals, experts, why sites are kept."""
        return [str(self.totals), *self.expert_lines(), *self.kept_lines()]

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
        """Write the plan as one page that needs nothing else, and return its path."""
        options = Section("options", options_html(self.options, {}))
        sections = [*plan_sections(self.sites), options]
        page = render_page("fqcompile plan", [], self.totals.facts(), sections)
        return replace_text(path, page)
