"""3 match: find every matmul with a constant weight; list other constant matrices and readers.

linear(x, cat([wq, wk]).to(bf16), b)   ->   WeightSite(x, recipe: cat, to; sources: wq, wk; bias: b)
bmm(w[ids], x.unsqueeze(-1))           ->   WeightSite(x, recipe: identity; source: w; ids)
_grouped_mm(x, w.mT, offs=offsets)     ->   WeightSite(x, the same recipe; offsets)
"""

from collections.abc import Sequence

from torch import fx

from fqcompile.passes.contraction import contraction
from fqcompile.passes.effects import effects_between, in_transforms
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.kept import kept_matrices, note_tables, warnings_of_kept
from fqcompile.passes.naming import is_table, joined_name
from fqcompile.passes.state import Contraction, GraphState, Kind, WeightSite, example
from fqcompile.weights.recipe import simplified


def match(state: GraphState) -> int:
    """Fill `state.sites` and `state.kept`; return the number of sites."""
    folder = ConstantFolder(state)
    note_tables(state)
    transformed = in_transforms(state.graph)  # inside one, our operators have no rule to run by
    for node in state.graph.nodes:
        site = None if node in transformed else _find(state, node, folder)
        if site is not None:
            state.sites.append(site)
    state.sites = _without_folded(state.sites)
    _number_equal_names(state.sites)
    state.kept = kept_matrices(state)
    state.warnings += warnings_of_kept(state)
    state.matched = [f"{s.name}: {s.node.format_node()}" for s in state.sites]
    return len(state.sites)


def _find(state: GraphState, node: fx.Node, folder: ConstantFolder) -> WeightSite | None:
    found = contraction(node, folder.is_constant)
    if found is None or not _is_float(node, found.x) or _is_overwritten(state, node, found):
        return None
    return _site(state, node, found, folder)


def _is_overwritten(state: GraphState, node: fx.Node, found: Contraction) -> bool:
    """Whether a write may part what was gathered from what the op reads in the product's place."""
    if any(part in state.written for part in found.gather):
        return True
    late = bool(found.gather) and found.ids in state.written
    return late and effects_between(found.gather[0], node)


def _without_folded(sites: list[WeightSite]) -> list[WeightSite]:
    """Drop products of constants that only serve as weights of others: they are folded there."""
    weights = {site.node: site.contraction.weight for site in sites}

    def only_weighs(site: WeightSite) -> bool:
        return bool(site.node.users) and all(
            weights.get(user) is site.node and user.all_input_nodes.count(site.node) == 1
            for user in site.node.users
        )

    return [site for site in sites if not only_weighs(site)]


def _is_float(node: fx.Node, operand: fx.Node) -> bool:
    x, out = example(operand), example(node)
    return x is not None and out is not None and x.is_floating_point() and out.is_floating_point()


def _site(
    state: GraphState, node: fx.Node, found: Contraction, folder: ConstantFolder
) -> WeightSite:
    recipe, sources = folder.recipe(found.stack)
    weight = found.stack.meta["example_value"]
    for method, args in found.weight_steps:
        recipe, weight = recipe.then(method, *args), getattr(weight, method)(*args)
    fakes = tuple(source.meta["example_value"] for source in sources)
    one = [] if found.of_experts else sources
    tables = tuple(node for node in one if is_table(state.args[state.constants[node]]))
    return WeightSite(
        kind=_kind(found, weight.stride()),
        node=node,
        contraction=found,
        recipe=simplified(recipe, fakes),
        sources=sources,
        shape=tuple(map(int, weight.shape)),  # `int` fixes what Dynamo left symbolic
        name=joined_name(state.known, sources),
        head=bool(tables) or any(state.known[source].of_head for source in one),
        tables=tables,
    )


def _kind(found: Contraction, strides: Sequence[int]) -> Kind:
    """Experts are numbered by the outermost dimension of [E, N, K], heads often by an inner one."""
    if not found.of_experts:
        return "linear"
    outermost = int(strides[0]) == max(map(int, strides))
    return "experts" if found.routing is not None or outermost else "other"


def _number_equal_names(sites: list[WeightSite]) -> None:
    """Different slices of one parameter are different sites: in_proj[0], in_proj[1]."""
    recipes: dict[str, dict[str, None]] = {}
    for site in sites:
        recipes.setdefault(site.name, {})[site.recipe.key] = None
    for site in sites:
        keys = list(recipes[site.name])
        if len(keys) > 1:
            site.part = f"[{keys.index(site.recipe.key)}]"
            site.name += site.part
