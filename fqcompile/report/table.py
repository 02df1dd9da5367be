"""Sites as a table: in at most 120 columns of text, and in full for the page."""

from collections.abc import Sequence

from tabulate import tabulate

from fqcompile.report.html import Cell, Table
from fqcompile.report.site import Site

WIDTH = 120
MIN_LAST = 24
HEADERS = ("name", "shape", "status", "group", "size, MiB", "error", "kernel, or why kept")
ALIGN = ("left", "right", "left", "right", "right", "right", "left")


def shorten(text: str, width: int, tail: float = 0.5) -> str:
    """Cut out the middle: of a parameter's name both ends matter (layer number, role).

    `tail` is the share of the width that the end of the text keeps.
    """
    if len(text) <= width:
        return text
    end = int((width - 1) * tail)
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def format_status(site: Site) -> str:
    return f"int{site.bits}" if site.status == "quantized" else site.status


def format_group(site: Site) -> str:
    if site.group_size is None:
        return ""
    return "column" if site.per_column else str(site.group_size)


def format_mib(count: int) -> str:
    return f"{count / 2**20:,.2f}"


def format_sizes(before: int, after: int) -> str:
    """Both in GiB or both in MiB, by what suits the larger."""
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
    """One line a site; the name gives way only when the last column is at its least width."""
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
        Cell(site.kernel or ""),
        Cell("" if site.least_us is None else f"{site.least_us:.1f}", site.least_us),
        Cell(site.reason or ""),
    )


def _worst_expert(site: Site) -> Cell:
    """Its error and number; nothing for a single matrix."""
    if not site.expert_errors:
        return Cell("")
    worst = max(site.expert_errors)
    return Cell(f"{worst:.4f} (expert {site.expert_errors.index(worst)})", worst)


PAGE_HEADERS = (
    *("name", "kind", "shape", "status", "group", "MiB before", "MiB after"),
    *("error", "worst expert", "kernel", "least µs", "reason"),
)


def site_page_table(sites: Sequence[Site]) -> Table:
    """The sites with nothing shortened; a column that says nothing of any of them is left out."""
    rows = [_cells(site) for site in sites]
    said = [i for i in range(len(PAGE_HEADERS)) if not rows or any(row[i].text for row in rows)]
    cells = tuple(tuple(row[i] for i in said) for row in rows)
    return Table("sites", tuple(PAGE_HEADERS[i] for i in said), cells, filterable=True)
