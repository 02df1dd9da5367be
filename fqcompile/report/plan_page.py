"""What the page says of a plan: sizes, map, errors, kernels, what was kept, sites and options."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from fqcompile.config import FineQuantConfig
from fqcompile.report.error_plots import errors_html
from fqcompile.report.granularity_map import map_html
from fqcompile.report.html import Cell, Section, Table, details, paragraph, table_html, unordered
from fqcompile.report.place import place_of
from fqcompile.report.site import Site
from fqcompile.report.table import format_mib, format_shape, site_page_table


def plan_sections(sites: Sequence[Site]) -> list[Section]:
    """The parts that a dry run has as well as a compilation; none where nothing was looked at."""
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
    """Every option, those unlike the default first, and the versions."""
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
    """The sites that share a key, the heaviest group first."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return sorted(groups.items(), key=lambda group: -weight(group[1]))


def _before(sites: Iterable[Site]) -> int:
    return sum(site.bytes_before for site in sites)


def _after(sites: Iterable[Site]) -> int:
    return sum(site.bytes_after for site in sites)


def _sizes(sites: Sequence[Site]) -> Table:
    """A row for each role: what all its weights took, and take."""
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
    """The kernels chosen, each with its part of the least time of all quantised matmuls."""
    if not sites:
        return "<p>none: nothing is quantised</p>"
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
    headers = ("kernel", "sites", "MiB of weights", "least µs", "share", "of the least time")
    table = table_html(Table("kernels", headers, rows))
    unknown = sum(site.least_us is None for site in sites)
    notes = [
        "least µs: what moving the bytes takes on this device, or on a GPU computing if that is "
        "longer, for the rows of the example call; no kernel can be faster"
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
    """For each reason the sites it holds for, folded away; the commonest reason first."""
    if not sites:
        return "<p>nothing: every weight that was looked at is quantised</p>"
    groups = _grouped(sites, lambda site: site.reason or "no reason recorded", len)
    return "\n".join(
        details(
            f"{len(group)} {'site' if len(group) == 1 else 'sites'}, "
            f"{format_mib(_after(group))} MiB: {reason}",
            unordered(f"{site.name}, {format_shape(site.shape)}" for site in group),
        )
        for reason, group in groups
    )
