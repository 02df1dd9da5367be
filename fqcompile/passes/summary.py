"""What the passes did to each weight, as the rows of a plan."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from fqcompile.distributed.shards import is_part
from fqcompile.kernels.roofline import least_seconds
from fqcompile.kernels.spec import GemmSpec
from fqcompile.passes.base import GraphState, placeholders
from fqcompile.passes.choose import CHANGING
from fqcompile.passes.op_nodes import argument
from fqcompile.passes.sites import KeptWeight, WeightSite
from fqcompile.quant.choose import QuantPlan
from fqcompile.report import Plan, Site
from fqcompile.tensor.format import num_groups
from fqcompile.weights.recipe import WeightRecipe, target_name


@dataclass(frozen=True)
class SiteRecipe:
    """How to find a site's matrix in a model by parameter names, and how it was quantised.

    Attributes:
        held: whether a module has them all, so that the names are those of its parameters.
        shared: those of `names` that are read too by what keeps their values, as a table's rows.
    """

    recipe: WeightRecipe
    names: tuple[str, ...]
    plan: QuantPlan
    held: bool = True
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Read:
    """How a matmul reads its weights: what it multiplies with, and the type of its scales."""

    recipe: str
    scale_dtype: torch.dtype | None


# The weights themselves, by identity, and how a matmul reads them; None: something else does.
RowKey = tuple[tuple[int, ...], Read | None]


def rows_of(state: GraphState) -> dict[RowKey, Site]:
    """One row per weight: a weight that several nodes read in the same way is one site."""
    rows: dict[RowKey, Site] = {}
    for site in state.sites:
        read = Read(site.recipe.key, site.plan.scale_dtype if site.plan else None)
        weights = tuple(id(state.args[state.constants[source]]) for source in site.sources)
        rows.setdefault((weights, read), _site(state, site))
    by_status: dict[str, set[int]] = {"kept": set(), "quantized": set()}
    for (weights, _), row in rows.items():
        by_status[row.status].update(weights)
    # A weight all of whose sites are kept has a row already.
    told = by_status["kept"] - by_status["quantized"]
    for weight in (w for w in state.kept if w.identity not in told):
        rows[(weight.identity,), None] = _kept(weight)
    return with_other_readers(rows)


def with_other_readers(rows: Mapping[RowKey, Site]) -> dict[RowKey, Site]:
    """The rows, where those of quantised weights say that something else reads the values."""
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
            found[weights, read] = replace(site, recipe=recipe)
    return found


def plan_of(state: GraphState) -> Plan:
    """The rows, sites before what no form reads."""
    return Plan(tuple(rows_of(state).values()), state.config.as_dict())


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
    assert site.packed is not None and site.op is not None
    group_size = state.packed[site.op].spec.group_size
    error = site.plan.relative_error  # not a number where the weight came packed
    return replace(
        kept,
        status="quantized",
        bits=site.plan.bits,
        group_size=group_size,
        bytes_after=_packed_bytes(site, group_size),
        relative_error=None if math.isnan(error) else error,
        expert_errors=site.plan.expert_errors or None,
        kernel=str(argument(site.op, "kernel")),
        least_us=_least_us(state, site),
        recipe=recipe,
    )


def _least_us(state: GraphState, site: WeightSite) -> Callable[[], float | None] | None:
    """Computes its part of what its matmul takes at the least, by its share of the rows.

    Later, where somebody asks: a CPU's bandwidth is measured on 128 MiB.
    """
    assert site.op is not None and site.packed is not None
    spec = state.gemms.get(site.op)
    share = site.packed.rows / state.packed[site.op].spec.rows
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
    """What a user would want to know without looking for it; to be logged too."""
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
    """The warning that the weights at these inputs stay as they are, and what to do."""
    names = {
        site.name
        for site in state.sites
        if not changing.isdisjoint(state.constants[source] for source in site.sources)
    }
    return (
        f"{state.name}: {', '.join(sorted(names))}: {CHANGING}, so it is read as it comes. If it "
        "is meant to change, name it in exclude; if a hook brings it from elsewhere for each call, "
        "call fqcompile.quantize_(model) before the hooks are set"
    )


def shared_facts(state: GraphState) -> Mapping[str, str]:
    """What must be the same on all ranks of a sharded model, by name, in the order of the graph.

    Collectives and sites in their order, and the options. Of a weight that every rank holds whole
    also the plan and the kernel; of a part each rank chooses its own.
    """
    facts = {"outcome": "quantised"}
    facts |= {f"option {name}": str(value) for name, value in state.config.as_dict().items()}
    del facts["option debug_dir"]  # each rank may have its own
    facts["collectives"] = ", ".join(_collectives(state.graph))
    # the inputs of packed weights come after those of the graph's own arguments
    inputs = zip(placeholders(state.graph), state.args, strict=False)
    parts = {state.names[n] for n, arg in inputs if is_part(arg)}
    for number, site in enumerate(state.sites):
        facts[f"site {number}"] = f"{site.kind} {site.name}"
        if not parts & {state.names[source] for source in site.sources}:
            facts[site.name] = _choice(site)
    return facts


def _collectives(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        name = target_name(node.target) if node.op.startswith("call") else ""
        if "c10d" in name:
            yield name
        elif name.removeprefix("prim_") in ("redistribute", "full_tensor"):
            yield f"{name} to {node.kwargs.get('placements', node.args[1:])}"


def _choice(site: WeightSite) -> str:
    if site.plan is None:
        return f"kept: {site.reason}"
    plan, kernel = site.plan, None if site.op is None else argument(site.op, "kernel")
    chosen = (plan.bits, plan.group_size, plan.scale_method, str(plan.scale_dtype))
    return f"{chosen}, kernel {kernel}"
