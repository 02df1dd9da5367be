"""3 match: find every matmul with a constant weight; say of other constant matrices who reads them.

linear(x, cat([wq, wk]).to(bf16), b)   ->   LinearSite(x, recipe: cat, to; sources: wq, wk; bias: b)
bmm(w[ids], x.unsqueeze(-1))           ->   ExpertSite(x, recipe: identity; source: w; routing: ids)
_grouped_mm(x, w.mT, offs=offsets)     ->   ExpertSite(x, the same recipe; routing: offsets)
"""

from torch import Tensor, fx

from fqcompile.passes.base import GraphState, example
from fqcompile.passes.effects import effects_between, in_transforms
from fqcompile.passes.expert_forms import ExpertForm, expert_form
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.kept import kept_matrices, note_tables, warnings_of_kept
from fqcompile.passes.linear_forms import LinearForm, linear_form
from fqcompile.passes.naming import is_table, joined_name
from fqcompile.passes.sites import ExpertSite, LinearSite, WeightSite
from fqcompile.weights.recipe import simplified


def match(state: GraphState) -> int:
    """Fill `state.sites` and `state.kept`; returns the number of sites."""
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
    linear = linear_form(node, folder.is_constant)
    if linear is not None:
        return _linear_site(state, node, linear, folder) if _is_float(node, linear.x) else None
    experts = expert_form(node, folder.is_constant)
    if experts is None or not _is_float(node, experts.x) or _is_overwritten(state, node, experts):
        return None
    return _expert_site(state, node, experts, folder)


def _is_overwritten(state: GraphState, node: fx.Node, form: ExpertForm) -> bool:
    """Whether a write may part what was gathered from what the op reads in the product's place."""
    if any(part in state.written for part in form.gather):
        return True
    late = bool(form.gather) and form.routing in state.written
    return late and effects_between(form.gather[0], node)


def _without_folded(sites: list[WeightSite]) -> list[WeightSite]:
    """Drop products of constants that only serve as weights of others: they are folded there."""
    weights = {site.node: site.weight for site in sites}

    def only_weighs(site: WeightSite) -> bool:
        return bool(site.node.users) and all(
            weights.get(user) is site.node and user.all_input_nodes.count(site.node) == 1
            for user in site.node.users
        )

    return [site for site in sites if not only_weighs(site)]


def _is_float(node: fx.Node, operand: fx.Node) -> bool:
    x, out = example(operand), example(node)
    return x is not None and out is not None and x.is_floating_point() and out.is_floating_point()


def _linear_site(
    state: GraphState, node: fx.Node, form: LinearForm, folder: ConstantFolder
) -> LinearSite:
    recipe, sources = folder.recipe(form.weight)
    for step in form.weight_steps:
        recipe = recipe.then(step.method, *step.args)
    fakes = tuple(source.meta["example_value"] for source in sources)
    tables = tuple(node for node in sources if is_table(state.args[state.constants[node]]))
    return LinearSite(
        node=node,
        x=form.x,
        weight=form.weight,
        recipe=simplified(recipe, fakes),
        sources=sources,
        shape=_matrix_shape(form),
        bias=form.bias,
        x_steps=form.x_steps,
        out_steps=form.out_steps,
        name=joined_name(state.known, sources),
        head=bool(tables) or any(state.known[source].of_head for source in sources),
        tables=tables,
    )


def _expert_site(
    state: GraphState, node: fx.Node, form: ExpertForm, folder: ConstantFolder
) -> ExpertSite:
    recipe, sources = folder.recipe(form.stack)
    stack = example(form.stack)
    assert stack is not None
    for method, args in form.weight_steps:
        recipe, stack = recipe.then(method, *args), getattr(stack, method)(*args)
    fakes = tuple(source.meta["example_value"] for source in sources)
    return ExpertSite(
        kind="experts" if _is_of_experts(form, stack) else "other",
        node=node,
        x=form.x,
        weight=form.weight,
        recipe=simplified(recipe, fakes),
        sources=sources,
        shape=tuple(map(int, stack.shape)),
        bias=form.bias,
        name=joined_name(state.known, sources),
        form=form.form,
        routing=form.routing,
        indices=form.indices,
        gather=form.gather,
        zero_rest=form.zero_rest,
    )


def _is_of_experts(form: ExpertForm, stack: Tensor) -> bool:
    """Whether its matrices are numbered by the outermost dimension, not as heads by an inner one.

    stack: [E, N, K], a view of the constant where no step copies it.
    """
    strides = [int(stride) for stride in stack.stride()]
    return form.routing is not None or strides[0] == max(strides)


def _matrix_shape(form: LinearForm) -> tuple[int, int]:
    """[N, K] as integers; `int` fixes a dimension that Dynamo left symbolic."""
    weight = example(form.weight)
    assert weight is not None
    for step in form.weight_steps:
        weight = getattr(weight, step.method)(*step.args)
    n, k = weight.shape
    return int(n), int(k)


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
