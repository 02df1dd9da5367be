"""Summarize the result of the passes for each weight, as the rows of a plan."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import fx

from fqcompile.kernels.roofline import least_seconds
from fqcompile.kernels.spec import GemmSpec
from fqcompile.passes.naming import InputName, joined_name
from fqcompile.passes.op_nodes import argument
from fqcompile.passes.plan import CHANGING, Decision, key_of
from fqcompile.passes.state import GraphState, KeptWeight, WeightSite
from fqcompile.quant.choose import QuantPlan
from fqcompile.report import Site
from fqcompile.tensor.format import num_groups
from fqcompile.weights.recipe import WeightRecipe

_NO_MORE_PLANS = (
    "its graph was compiled for as many sets of plans as allowed, and the one that serves this "
    "weight keeps it dense"
)


@dataclass(frozen=True)
class SiteRecipe:
    """How to locate a site's matrix in a model by parameter names, and how it was quantized.

    Attributes:
        held: whether modules hold all of them, so that the names are names of parameters.
        shared: those of `names` whose dense values are read elsewhere too, as rows of a table.
        of_tables: embeddings that hold it read the quantized values too.
    """

    recipe: WeightRecipe
    names: tuple[str, ...]
    plan: QuantPlan
    held: bool = True
    shared: frozenset[str] = frozenset()
    of_tables: bool = False


@dataclass(frozen=True)
class Read:
    """How a matmul reads its weights: the key of its recipe, and the dtype of its scales."""

    recipe: str
    scale_dtype: torch.dtype | None


# The ids of the weights, and how a matmul reads them; None for any other reader.
RowKey = tuple[tuple[int, ...], Read | None]


@dataclass(frozen=True)
class Row:
    """The row of a weight, with what is needed to make the row of another instance's weight.

    Attributes:
        inputs: the positions of the tensors that it is named after.
        part: the end of the name.
        table: whether it is named after the module that reads its rows.
        decision: the index of its site among those that are not settled.
    """

    site: Site
    inputs: tuple[int, ...]
    part: str = ""
    table: bool = False
    decision: int | None = None

    def of(self, known: Mapping[int, InputName], decisions: Sequence[Decision]) -> Site:
        """The row for an instance with these names of inputs and decisions of sites."""
        site, names = self.site, tuple(known[i].name for i in self.inputs)
        name = known[self.inputs[0]].table if self.table else joined_name(known, self.inputs)
        site = site.but(name=name + self.part)
        decision = None if self.decision is None else decisions[self.decision]
        if decision is None:
            return site
        if site.status == "kept":
            return site.but(reason=decision if isinstance(decision, str) else _NO_MORE_PLANS)
        recipe = site.recipe
        assert isinstance(recipe, SiteRecipe) and isinstance(decision, QuantPlan)
        if key_of([decision]) != key_of([recipe.plan]):  # its error with the other plan is unknown
            asked = replace(recipe.plan, relative_error=math.nan, expert_errors=())
            decision = replace(asked, calibration=decision.calibration)
        pairs = zip(recipe.names, names, strict=True)
        shared = frozenset(new for old, new in pairs if old in recipe.shared)
        recipe = replace(recipe, names=names, plan=decision, shared=shared)
        return site.but(recipe=recipe, **said_of(decision))


def rows_of(state: GraphState) -> dict[RowKey, Row]:
    """One row per weight: a weight that several nodes read in the same way is one site."""
    rows: dict[RowKey, Row] = {}
    places = count()
    for site in state.sites:
        read = Read(site.recipe.key, site.plan.scale_dtype if site.plan else None)
        inputs = tuple(state.constants[source] for source in site.sources)
        weights = tuple(id(state.args[i]) for i in inputs)
        place = None if site.settled else next(places)
        row = Row(_site(state, site), inputs, site.part, decision=place)
        rows.setdefault((weights, read), row)
    by_status: dict[str, set[int]] = {"kept": set(), "quantized": set()}
    for (weights, _), row in rows.items():
        by_status[row.site.status].update(weights)
    # A weight whose sites are all kept has a row already.
    told = by_status["kept"] - by_status["quantized"]
    for weight in (w for w in state.kept if w.identity not in told):
        inputs = () if weight.input is None else (weight.input,)
        rows[(weight.identity,), None] = Row(_kept(weight), inputs, table=weight.table)
    sites = with_other_readers({key: row.site for key, row in rows.items()})
    return {key: replace(row, site=sites[key]) for key, row in rows.items()}


def with_other_readers(rows: Mapping[RowKey, Site]) -> dict[RowKey, Site]:
    """The rows, with `shared` filled in for quantized weights whose values are read elsewhere."""
    dense = {w for (weights, read) in rows if read is None for w in weights}
    dense_reads = {
        (weights, read.recipe)
        for (weights, read), site in rows.items()
        if read is not None and site.status == "kept"
    }
    found = dict(rows)
    for (weights, read), site in rows.items():
        if read is None or not isinstance(site.recipe, SiteRecipe):
            continue
        kept = weights if (weights, read.recipe) in dense_reads else dense.intersection(weights)
        names = {n for n, w in zip(site.recipe.names, weights, strict=True) if w in kept}
        if names:
            recipe = replace(site.recipe, shared=site.recipe.shared | names)
            found[weights, read] = site.but(recipe=recipe)
    return found


def rows_beside(
    rows: Sequence[Row],
    told: Collection[str],
    known: Mapping[int, InputName],
    decisions: Sequence[Decision],
) -> tuple[Site, ...]:
    """The rows of another instance that runs the graph of `rows`, except names in `told`.

    Weights that no module holds are left out: their names are paths, equal in every instance.
    """
    held = [row for row in rows if any(known[i].held for i in row.inputs)]
    found = (row.of(known, decisions) for row in held)
    return tuple(site for site in found if site.name not in told)


def _site(state: GraphState, site: WeightSite) -> Site:
    before = sum(_bytes(state, source) for source in site.sources)
    if site.recipe.steps:
        before = min(before, site.num_weights * _element_size(state, site))
    kept = Site(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        status="kept",
        reason=site.reason,
        bytes_before=before,
        bytes_after=before,
    )
    if site.plan is None:
        return kept
    known = [state.known[source] for source in site.sources]
    recipe = SiteRecipe(
        site.recipe,
        tuple(input.name for input in known),
        site.plan,
        held=all(input.held for input in known),
        shared=frozenset(state.known[source].name for source in site.tables),
    )
    assert site.op is not None
    group_size = state.packed[site.op].group_size
    return replace(
        kept,
        status="quantized",
        bits=site.plan.bits,
        levels=site.plan.levels,
        group_size=group_size,
        bytes_after=_packed_bytes(site, group_size),
        **said_of(site.plan),
        kernel=str(argument(site.op, "kernel")),
        least_us=_least_us(state, site),
        recipe=recipe,
    )


def said_of(plan: QuantPlan) -> dict[str, Any]:
    """The fields of a row about errors, and the calibration that weighted them."""
    error = plan.relative_error  # NaN if the weight was packed before
    calibration = plan.calibration
    return {
        "relative_error": None if math.isnan(error) else error,
        "calibration": None if calibration is None else calibration.source,
        "calibration_rows": None if calibration is None else calibration.rows,
        "expert_errors": plan.expert_errors or None,
    }


def _least_us(state: GraphState, site: WeightSite) -> Callable[[], float | None] | None:
    """The site's part of the matmul's roofline lower bound, in proportion to its rows.

    It is computed on first use, because that measures a CPU's memory bandwidth.
    """
    assert site.op is not None
    spec = state.gemms.get(site.op)
    share = site.shape[-2] / state.packed[site.op].rows
    return None if spec is None else partial(_share_of_least_us, spec, share)


def _share_of_least_us(spec: GemmSpec, share: float) -> float | None:
    whole = least_seconds(spec)
    return None if whole is None else 1e6 * whole * share


def _kept(weight: KeptWeight) -> Site:
    return Site(
        name=weight.name,
        kind=weight.kind,
        shape=weight.shape,
        status="kept",
        reason=weight.reason,
        bytes_before=weight.nbytes,
        bytes_after=weight.nbytes,
    )


def _packed_bytes(site: WeightSite, group_size: int) -> int:
    assert site.plan is not None
    k = site.shape[-1]
    n = site.num_weights // k
    codes = n * (-(-k * site.plan.bits // 8))
    return codes + n * num_groups(k, group_size) * site.plan.scale_dtype.itemsize


def _bytes(state: GraphState, source: fx.Node) -> int:
    weight = state.args[state.constants[source]]
    return int(weight.numel() * weight.element_size())


def _element_size(state: GraphState, site: WeightSite) -> int:
    return int(state.args[state.constants[site.sources[0]]].element_size())


def warnings_of(state: GraphState) -> tuple[str, ...]:
    """Warnings for the report, which are also logged."""
    frozen = [s.name for s in state.sites if s.reason and "requires grad" in s.reason]
    texts = list(state.warnings)
    if frozen:
        texts.append(
            f"{len(frozen)} of {len(state.sites)} sites are kept: their weights require grad "
            f"({frozen[0]}, ...): call the model under torch.no_grad(), or freeze them with "
            "requires_grad_(False)"
        )
    kernels = [str(argument(op, "kernel")) for op in state.packed]
    if state.config.autotune != "off" and kernels and not any(":" in k for k in kernels):
        texts.append(
            f"autotune={state.config.autotune!r}: the kernels of this graph "
            f"({', '.join(sorted(set(kernels)))}) have nothing to configure"
        )
    return tuple(texts)


def read_as_it_comes(state: GraphState, changing: frozenset[int]) -> str:
    """The warning that the weights at these inputs are read dense, with the remedy."""
    names = {
        site.name
        for site in state.sites
        if not changing.isdisjoint(state.constants[source] for source in site.sources)
    }
    return (
        f"{state.name}: {', '.join(sorted(names))}: {CHANGING}, so it is read dense. If it is "
        "meant to change, name it in exclude; if a hook loads it for each call, call "
        "fqcompile.quantize_(model) before the hooks are set"
    )
