"""The result for one weight: a row of a plan or compile report, and rows formatted as a table.

The text table is at most 120 characters wide and shortens names; the HTML page does not.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from tabulate import tabulate

from fqcompile.report.page import Cell, Table
from fqcompile.tensor.format import QTYPES, UNIFORM

LeastTime = float | Callable[[], float | None] | None


class _OnceAsked:
    """A field set to a number, or to a function that computes it when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, site: Any, owner: type | None = None) -> float | None:
        value: LeastTime = None if site is None else site.__dict__[self._name]
        if callable(value):
            value = site.__dict__[self._name] = value()
        return value

    def __set__(self, site: Any, value: LeastTime) -> None:
        site.__dict__[self._name] = value


@dataclass(frozen=True, kw_only=True)
class Site:
    """A linear or a stack of experts whose weight was considered for quantization.

    Attributes:
        name: of the parameter, as in `named_parameters()`.
        kind: "linear" or "experts".
        shape: (N, K): outputs and inputs; or (E, N, K) of E experts.
        status: "quantized", or "kept" dense.
        reason: why it is kept.
        bits: 4 or 8.
        levels: "normal" or "uniform".
        group_size: how many weights along K share a scale; K for per-channel scales.
        bytes_before, bytes_after: of the weight; with its scales after.
        relative_error: ‖w-ŵ‖/‖w‖ of the stored codes.
        calibration: what its errors were weighed with: "synthetic", "first_call", "batches", or
            "none" and why.
        calibration_rows: how many rows that were.
        expert_errors: the relative error of each expert.
        kernel: the kernel that multiplies by it here.
        least_us: the roofline lower bound in microseconds for the rows of the example call: the
            time to move its bytes or, on a GPU, to compute if that is longer; a CPU's bandwidth is
            measured on first use.
        recipe: locates the weight in a model, for `fake_quantize_`; never written to files.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    status: str
    reason: str | None = None
    bits: int | None = None
    levels: str | None = None
    group_size: int | None = None
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None
    calibration: str | None = None
    calibration_rows: int | None = None
    expert_errors: tuple[float, ...] | None = None
    kernel: str | None = None
    least_us: _OnceAsked = _OnceAsked()
    recipe: object | None = field(default=None, repr=False, compare=False)

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def per_column(self) -> bool:
        """Whether scales are per channel."""
        return self.group_size is not None and self.group_size >= self.shape[-1]

    def but(self, **changes: object) -> Self:
        """A copy of the row with these changes; fields that compute on first read stay lazy."""
        return replace(self, **{"least_us": vars(self)["least_us"], **changes})

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON values, without the recipe."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
        return {**named, "shape": list(self.shape)}


_NUMBER = re.compile(r"(?<!\w)(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")  # no part of a name: float16
WIDTH = 120
MIN_LAST = 24
HEADERS = ("name", "shape", "status", "group", "size, MiB", "error", "kernel, or why kept")
ALIGN = ("left", "right", "left", "right", "right", "right", "left")


def shorten(text: str, width: int, tail: float = 0.5) -> str:
    """Shorten a text in the middle: both ends of a parameter name matter (layer number, role).

    `tail` is the share of the width that the end of the text keeps.
    """
    if len(text) <= width:
        return text
    end = int((width - 1) * tail)
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def format_status(site: Site) -> str:
    if site.status != "quantized" or site.bits is None:
        return site.status
    return QTYPES[site.bits, site.levels or UNIFORM].name


def format_group(site: Site) -> str:
    if site.group_size is None:
        return ""
    return "column" if site.per_column else str(site.group_size)


def format_mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"


def format_sizes(before: int, after: int) -> str:
    """Both sizes in GiB or both in MiB, depending on the larger one."""
    if max(before, after) < 2**30:
        return f"{format_mib(before)} → {format_mib(after)} MiB"
    return f"{before / 2**30:,.2f} → {after / 2**30:,.2f} GiB"


def format_error(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


def _row(site: Site) -> list[str]:
    size = format_mib(site.bytes_before)
    if site.status == "quantized":
        size = f"{size} → {format_mib(site.bytes_after)}"
    return [
        site.name,
        format_shape(site.shape),
        format_status(site),
        format_group(site),
        size,
        format_error(site.relative_error),
        site.kernel or site.reason or "",
    ]


def site_table(sites: Sequence[Site]) -> str:
    """One line per site; names are shortened once the last column is at its minimum width."""
    rows = [_row(site) for site in sites]
    widest = [max(map(len, column)) for column in zip(HEADERS, *rows, strict=True)]
    free = WIDTH - sum(widest[1:-1]) - 2 * (len(HEADERS) - 1)
    name = min(widest[0], max(free - widest[-1], free - MIN_LAST))
    last = min(widest[-1], free - name)
    for site, row in zip(sites, rows, strict=True):
        row[0] = shorten(row[0], name)
        row[-1] = shorten(row[-1], last, tail=0.5 if site.kernel else 0)
    # As rows of the body: tabulate widens every column that has a header by two.
    rule = ["-" * width for width in (name, *widest[1:-1], last)]
    return tabulate([HEADERS, rule, *rows], tablefmt="plain", colalign=ALIGN, disable_numparse=True)


def reasons_of(sites: Iterable[Site]) -> list[tuple[str, list[Site]]]:
    """The sites by the reason why they are kept, the most common reason first.

    Reasons that differ in numbers alone are one, with … for the numbers that differ.
    """
    alike: dict[str, list[Site]] = {}
    for site in sites:
        alike.setdefault(_NUMBER.sub("…", reason_of(site)), []).append(site)
    groups = sorted(alike.values(), key=lambda group: -len(group))
    return [(_common(list(map(reason_of, group))), group) for group in groups]


def reason_of(site: Site) -> str:
    return site.reason or "no reason recorded"


def _common(reasons: Sequence[str]) -> str:
    parts = zip(*map(_NUMBER.split, reasons), strict=True)
    return "".join(same[0] if len(set(same)) == 1 else "…" for same in parts)


def _cells(site: Site) -> tuple[Cell, ...]:
    return (
        Cell(site.name),
        Cell(site.kind),
        Cell(format_shape(site.shape), site.num_weights),
        Cell(format_status(site)),
        Cell(format_group(site), site.group_size),
        Cell(format_mib(site.bytes_before), site.bytes_before),
        Cell(format_mib(site.bytes_after), site.bytes_after),
        Cell(format_error(site.relative_error), site.relative_error),
        _worst_expert(site),
        Cell(site.calibration or ""),
        Cell("" if site.calibration is None else str(site.calibration_rows), site.calibration_rows),
        Cell(site.kernel or ""),
        Cell("" if site.least_us is None else f"{site.least_us:.1f}", site.least_us),
        Cell(site.reason or ""),
    )


def _worst_expert(site: Site) -> Cell:
    """The error and index of the worst expert; empty for a single matrix."""
    if not site.expert_errors:
        return Cell("")
    worst = max(site.expert_errors)
    return Cell(f"{worst:.4f} (expert {site.expert_errors.index(worst)})", worst)


PAGE_HEADERS = (
    *("name", "kind", "shape", "status", "group", "MiB before", "MiB after"),
    *("error", "worst expert", "calibration", "rows", "kernel", "lower bound µs", "reason"),
)


def site_page_table(sites: Sequence[Site]) -> Table:
    """The sites with all text in full; columns that are empty for every site are left out."""
    rows = tuple(_cells(site) for site in sites)
    return Table("sites", PAGE_HEADERS, rows, filterable=True).without_empty()
