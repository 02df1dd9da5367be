"""The granularity map: the format of each layer's projections, as a grid of colored tiles.

A row is a layer, a column a role, a tile one format. Finer groups have stronger colors. The layer
and role of a weight are parsed from its parameter name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fqcompile.report.page import filter_button, paragraph, scroll_box
from fqcompile.report.site import Site, format_error, format_group, format_shape, format_status

# The coarsest group size of each step of the color scale, after per-channel.
STEPS = (256, 128, 64, 32, 16)
SUFFIX = ".weight"


@dataclass(frozen=True)
class Place:
    """`model.layers.3.mlp.up_proj.weight` is layer 3 of `model.layers`, its tail the rest.

    The number of an expert is a `*` in the tail, so that all experts of a layer share one role.
    Outside any layer, `stack` is empty, `layer` None and `tail` the whole name.
    """

    stack: str
    layer: int | None
    tail: str

    @property
    def role(self) -> str:
        """The tail for display: without `.weight`."""
        return "+".join(part.removesuffix(SUFFIX) or part for part in self.tail.split("+"))

    @property
    def layer_query(self) -> str:
        """The filter text that selects this layer; `^` stands for the beginning of a name."""
        return f"^{self.stack}.{self.layer}." if self.stack else f"^{self.layer}."

    @property
    def role_query(self) -> str:
        """The filter text that selects this role in every layer: words that must all occur."""
        if self.layer is None:
            return f"^{self.tail}"
        return f".{self.tail}".replace("*", " ").replace("+", " ")


def place_of(name: str) -> Place:
    """The place of a parameter; for several joined by `+`, that of the first."""
    stack, layer, first = _split(name.partition("+")[0])
    others = [_split(other) for other in name.split("+")[1:]]
    if layer is None or any(other[:2] != (stack, layer) for other in others):
        return Place(stack, layer, "+".join([first, *name.split("+")[1:]]))
    return Place(stack, layer, "+".join([first, *(tail for _, _, tail in others)]))


def _split(name: str) -> tuple[str, int | None, str]:
    """The text before the first number of a name, the number, and the text after it."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        tail = ".".join(_same_expert(parts[at + 1 :]))
        if part.isascii() and part.isdecimal() and tail.strip("."):
            return ".".join(parts[:at]), int(part), tail
    return "", None, name


def _same_expert(parts: list[str]) -> list[str]:
    before = ["", *parts]
    return [
        "*" if part.isdecimal() and previous == "experts" else part
        for previous, part in zip(before, parts, strict=False)
    ]


@dataclass(frozen=True)
class Grid:
    """One stack of layers: the sites of each (layer, role), both in order of appearance."""

    stack: str
    layers: tuple[Place, ...]
    roles: tuple[Place, ...]
    cells: dict[tuple[int | None, str], list[Site]]


def grids_of(sites: Sequence[Site]) -> tuple[list[Grid], list[Site]]:
    """A grid for each stack of layers, and the sites outside all stacks."""
    stacks: dict[str, list[tuple[Place, Site]]] = {}
    outside: list[Site] = []
    for site in sites:
        place = place_of(site.name)
        if place.layer is None:
            outside.append(site)
        else:
            stacks.setdefault(place.stack, []).append((place, site))
    return [_grid(stack, placed) for stack, placed in stacks.items()], outside


def _grid(stack: str, placed: Sequence[tuple[Place, Site]]) -> Grid:
    cells: dict[tuple[int | None, str], list[Site]] = {}
    layers: dict[int, Place] = {}
    roles: dict[str, Place] = {}
    for place, site in placed:
        cells.setdefault((place.layer, place.role), []).append(site)
        layers.setdefault(place.layer or 0, place)
        roles.setdefault(place.role, place)
    return Grid(stack, tuple(layers[n] for n in sorted(layers)), tuple(roles.values()), cells)


def step_of(site: Site) -> int:
    """The step on the color scale: 0 for per-channel, up to 5 for groups of at most 16."""
    if site.per_column:
        return 0
    finest = len(STEPS)
    return next((i for i, size in enumerate(STEPS, 1) if (site.group_size or 0) >= size), finest)


def map_html(sites: Sequence[Site]) -> str:
    """The legend, the grid of each stack, and the sites outside the layers."""
    grids, outside = grids_of(sites)
    parts = [_legend(sites), *map(_grid_html, grids)]
    if outside:
        tiles = "".join(_named_tile(site) for site in outside)
        heading = "<h3>outside the layers</h3>" if grids else ""
        parts.append(f'{heading}<ul class="tiles">{tiles}</ul>')
    return "\n".join(parts)


def _grid_html(grid: Grid) -> str:
    heads = "".join(f'<th scope="col">{_role_head(role)}</th>' for role in grid.roles)
    rows = "\n".join(_row(grid, layer) for layer in grid.layers)
    table = (
        f'<table class="map">\n<thead><tr><th scope="col">layer</th>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table>"
    )
    title = grid.stack or "layers"
    return f"<h3>{escape(title)}</h3>\n{scroll_box(table, f'granularity map of {title}')}"


def _role_head(role: Place) -> str:
    parent, _, leaf = role.role.rpartition(".")
    small = f"<small>{escape(parent)}</small>" if parent else ""
    return small + filter_button(leaf, role.role_query, f"show the sites {role.role}")


def _row(grid: Grid, layer: Place) -> str:
    number = str(layer.layer)
    head = filter_button(number, layer.layer_query, f"show the sites of layer {number}")
    cells = "".join(
        f"<td>{_tiles(grid.cells.get((layer.layer, role.role), []))}</td>" for role in grid.roles
    )
    return f'<tr><th scope="row">{head}</th>{cells}</tr>'


def _tiles(sites: Sequence[Site]) -> str:
    """One tile per format among the sites, with the count if there are several."""
    alike: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        alike.setdefault((format_status(site), format_group(site)), []).append(site)
    return "".join(_tile(group) for group in alike.values())


def _tile(sites: Sequence[Site]) -> str:
    site = sites[0]
    times = f" ×{len(sites)}" if len(sites) > 1 else ""
    css = f"bits{site.bits} step{step_of(site)}" if site.status == "quantized" else "kept"
    title = "\n".join(map(_describe, sites))
    return f'<span class="tile {css}" title="{escape(title)}">{escape(_label(site) + times)}</span>'


def _label(site: Site) -> str:
    experts = f" {site.shape[0]}e" if site.kind == "experts" else ""
    if site.status != "quantized":
        return site.status + experts
    return f"{format_status(site)} {_short_group(site)}{experts}"


def _short_group(site: Site) -> str:
    return "col" if site.per_column else f"g{site.group_size}"


def _describe(site: Site) -> str:
    what = f"{site.name}, {format_shape(site.shape)}: {format_status(site)}"
    if site.status != "quantized":
        return f"{what}, {site.reason or 'no reason recorded'}"
    group = "per channel" if site.per_column else f"groups of {site.group_size}"
    error = format_error(site.relative_error)
    return f"{what}, {group}" + (f", error {error}" if error else "")


def _named_tile(site: Site) -> str:
    return f"<li>{filter_button(site.name, f'^{site.name}')}{_tile([site])}</li>"


def _legend(sites: Sequence[Site]) -> str:
    """The tiles in use, from coarse to fine, and an explanation of their labels."""
    done = sorted(
        {(s.bits or 0, step_of(s), _label_alone(s)) for s in sites if s.status == "quantized"}
    )
    tiles = [
        f'<span class="tile bits{bits} step{step}">{escape(label)}</span>'
        for bits, step, label in done
    ]
    if any(site.status != "quantized" for site in sites):
        tiles.append('<span class="tile kept">kept</span>')
    words = "col: per channel, one scale for each output; gN: one scale for every N weights along K"
    if any(site.kind == "experts" for site in sites):
        words += "; Ne: a stack of N experts"
    return f'<p class="legend">{"".join(tiles)}</p>{paragraph(words, "quiet")}'


def _label_alone(site: Site) -> str:
    return f"{format_status(site)} {_short_group(site)}"
