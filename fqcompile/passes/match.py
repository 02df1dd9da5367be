"""2 match: find every matmul with a constant weight; say of other constant matrices who reads them.

linear(x, cat([wq, wk]).to(bf16), b)   ->   LinearSite(x, recipe: cat, to; sources: wq, wk; bias: b)
bmm(w[ids], x.unsqueeze(-1))           ->   ExpertSite(x, recipe: identity; source: w; routing: ids)
_grouped_mm(x, w.mT, offs=offsets)     ->   ExpertSite(x, the same recipe; routing: offsets)
"""

from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.config import HEAD_NAMES
from fqcompile.distributed.shards import NOT_LOCAL, is_dtensor, local_part
from fqcompile.passes.base import GraphState, example, placeholders
from fqcompile.passes.effects import bodies, effects_between, in_transforms
from fqcompile.passes.expert_forms import PRODUCTS, ExpertForm, expert_form
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.linear_forms import LinearForm, linear_form
from fqcompile.passes.sites import ExpertSite, KeptWeight, LinearSite, WeightSite
from fqcompile.weights.recipe import CASTS, MOVING, simplified, target_name

IN_A_BODY = "the bodies of higher-order operators stay as they are"
OUT_OF_THE_BODY = (
    "branch and loop in Python instead (cond, map, ...), or call the model under torch.no_grad() "
    "where this is checkpointing"
)
IN_THE_GRAPH = "it is a constant of the graph, not one of its inputs"
INTO_AN_INPUT = (
    "turn torch._inductor.config.freezing off, or call fqcompile.quantize_(model) before compiling"
)


def match(state: GraphState) -> int:
    """Fill `state.sites` and `state.kept`; returns the number of sites."""
    folder = ConstantFolder(state)
    transformed = in_transforms(state.graph)  # inside one, our operators have no rule to run by
    for node in state.graph.nodes:
        site = None if node in transformed else _find(state, node, folder)
        if site is not None:
            state.sites.append(site)
    state.sites = _without_folded(state.sites)
    _number_equal_names(state.sites)
    state.kept = _other_matrices(state)
    state.warnings += _warnings(state)
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
    return LinearSite(
        node=node,
        x=form.x,
        weight=form.weight,
        recipe=recipe,
        sources=sources,
        shape=_matrix_shape(form),
        bias=form.bias,
        x_steps=form.x_steps,
        out_steps=form.out_steps,
        name=_name(state, sources),
        head=any(HEAD_NAMES.search(state.names[s]) or _embeds(state, s) for s in sources),
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
        node=node,
        x=form.x,
        weight=form.weight,
        recipe=simplified(recipe, fakes),
        sources=sources,
        shape=tuple(map(int, stack.shape)),
        bias=form.bias,
        name=_name(state, sources),
        form=form.form,
        routing=form.routing,
        indices=form.indices,
        gather=form.gather,
        zero_rest=form.zero_rest,
    )


def _name(state: GraphState, sources: tuple[fx.Node, ...]) -> str:
    return "+".join(dict.fromkeys(state.names[s] for s in sources))


def _matrix_shape(form: LinearForm) -> tuple[int, int]:
    """[N, K] as integers; `int` fixes a dimension that Dynamo left symbolic."""
    weight = example(form.weight)
    assert weight is not None
    for step in form.weight_steps:
        weight = getattr(weight, step.method)(*step.args)
    n, k = weight.shape
    return int(n), int(k)


def _embeds(state: GraphState, source: fx.Node) -> bool:
    """Whether an embedding reads the weight; of a sharded one it may read the whole."""
    same = [node for node, name in state.names.items() if name == state.names[source]]
    return any(target_name(user.target) == "embedding" for node in same for user in node.users)


def _number_equal_names(sites: list[WeightSite]) -> None:
    """Different slices of one parameter are different sites: in_proj[0], in_proj[1]."""
    recipes: dict[str, dict[str, None]] = {}
    for site in sites:
        recipes.setdefault(site.name, {})[site.recipe.key] = None
    for site in sites:
        keys = list(recipes[site.name])
        if len(keys) > 1:
            site.name = f"{site.name}[{keys.index(site.recipe.key)}]"


def _other_matrices(state: GraphState) -> list[KeptWeight]:
    """Constant tensors that no site reads, and parameters passed in, from `min_elements` on."""
    used = {source for site in state.sites for source in site.sources}
    transformed = in_transforms(state.graph)
    kept = []
    given = dict(zip(placeholders(state.graph), state.args, strict=True))
    for node in state.names:
        if node in used or not node.users:
            continue
        whole: Any = given[node] if node in given else example(node)
        sharded, weight = is_dtensor(whole), local_part(whole)
        if not _is_matrix(weight, state.config.min_elements):
            continue
        reason = _why_not(state, node, transformed)
        reason = NOT_LOCAL if sharded and "embedding" not in reason else reason
        nbytes = weight.numel() * weight.element_size()
        kind = _kind(weight, node)
        kept.append(KeptWeight(state.names[node], kind, tuple(weight.shape), nbytes, reason))
    return kept


def _is_matrix(weight: Tensor, min_elements: int) -> bool:
    return (
        weight.dim() >= 2
        and (weight.is_floating_point() or weight.is_complex() or weight.is_quantized)
        and weight.numel() >= min_elements
    )


def _why_not(state: GraphState, node: fx.Node, transformed: dict[fx.Node, str]) -> str:
    if node in state.written:
        return f"{state.written[node]!r} in the graph may write to it"
    if node.op == "get_attr":
        return IN_THE_GRAPH
    if node not in state.constants:
        return "an argument of the compiled function: what the caller passes in is no weight"
    readers = _readers(node)
    names = dict.fromkeys(target_name(reader.target) for reader in readers)
    if "embedding" in names:
        return "embedding table: embeddings are not quantised"
    inside = [transformed[reader] for reader in readers if reader in transformed]
    if inside:
        return (
            f"read inside a torch.func transform ({inside[0]}), where packed weights have no rule"
        )
    if any(map(bodies, readers)):
        return f"read inside {', '.join(names)}: {IN_A_BODY}"
    if any(name.lstrip("_").startswith("conv") for name in names):
        return f"read by {', '.join(names)}: convolutions are not quantised"
    return f"read by {', '.join(names)}: not a linear or expert form that is quantised"


def _readers(source: fx.Node) -> list[fx.Node]:
    """The calls that read the tensor, also through views and casts of it."""
    found: list[fx.Node] = []
    waiting = [*source.users]
    seen = set(waiting)
    while waiting:
        node = waiting.pop(0)
        moves = node.users and target_name(node.target) in MOVING | CASTS
        following = [user for user in node.users if user not in seen] if moves else []
        if not moves:
            found.append(node)
        seen.update(following)
        waiting += following
    return found


def _kind(weight: Tensor, node: fx.Node) -> str:
    """A stack is one of experts where a product of matrices reads it; a table is none."""
    names = {target_name(reader.target) for reader in _readers(node)}
    if weight.dim() == 3 and names & PRODUCTS:
        return "experts"
    return "linear" if weight.dim() == 2 else "other"


def _warnings(state: GraphState) -> list[str]:
    """What a user can do for weights that are kept for how the graph was made."""
    remedies = {IN_A_BODY: OUT_OF_THE_BODY, IN_THE_GRAPH: INTO_AN_INPUT}
    names = {
        end: [kept.name for kept in state.kept if kept.reason.endswith(end)] for end in remedies
    }
    found = [
        f"{len(names[end])} weights ({names[end][0]}, ...) are kept: {end}; {remedy}"
        for end, remedy in remedies.items()
        if names[end]
    ]
    calls = [node for node in state.graph.nodes if node.op in ("call_function", "call_method")]
    if calls and not any("example_value" in node.meta for node in state.graph.nodes):
        found.append(
            "no call of the graph has an example value, so no weight of it is read: it was not "
            f"made by torch.compile, or by a release of torch not known here ({torch.__version__}; "
            "tested: 2.11 to 2.14); call fqcompile.quantize_(model) instead"
        )
    return found
