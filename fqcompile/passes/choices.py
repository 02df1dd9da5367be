"""Routers and codebooks, whose scores only select an entry and whose weights are skipped.

softmax(linear(x, w)).topk(2)        w is a router's: its top-k decides which experts run
argmin(-2 * linear(x, w) + |w|²)     w is a codebook
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, fx

from fqcompile.hf_compat import can_switch_experts
from fqcompile.passes.effects import has_effects
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.kept import is_like, reads_values
from fqcompile.passes.state import GraphState, WeightSite, example
from fqcompile.weights.recipe import CASTS, MOVING, target_name

# The rows of a router are its experts: far fewer than those of a vocabulary sampled by top-k.
_ROUTER_MAX_EXPERTS = 1024
_ROUTER_MAX_HOPS = 8
_CODEBOOK_MAX_ENTRIES = 1 << 14  # an output head's argmax is no codebook: vocabularies are larger
_RANKINGS = ("topk", "sort", "argsort")
_LEAST = ("argmin", "min")
_ONE_HOT = CASTS | {"one_hot"}
_MIXING = frozenset(
    "linear matmul bmm mm addmm baddbmm einsum scaled_dot_product_attention".split()
)
_MODELING = re.compile(r"transformers[/\\]models[/\\](\w+)[/\\](\w+)\.py")
_SWITCH_TO_GROUPED = (
    "for a model of Hugging Face call model.set_experts_implementation('grouped_mm') first"
)


def experts_outside(state: GraphState) -> list[str]:
    """Warnings for routers whose choice leaves the graph: the experts are behind a graph break."""
    if any(site.kind == "experts" for site in state.sites):
        return []
    routers = {site.node: site.name for site in state.sites if is_router(state, site)}
    return [
        f"the experts of router {name} are not in its graph: the model picks them in a Python loop "
        "over data, which breaks the graph; only those of their weights are quantized that a later "
        "graph multiplies with"
        f"{way_out(_modules_of(node))}"
        for node, name in routers.items()
        if any(_leaves(top) for top in _top_k_of(node))
    ]


def way_out(modules: Iterable[str]) -> str:
    """The remedy that brings experts into a graph, to append to a reason; else an empty string.

    Args:
        modules: names of the Python modules that define the model, as far as they are known.
    """
    known = [name for name in modules if name.startswith("transformers.models.")]
    return "" if known and not any(map(_has_switch, known)) else f"; {_SWITCH_TO_GROUPED}"


def _has_switch(module: str) -> bool:
    """Whether models of transformers in this Python module have the switch."""
    beside = vars(sys.modules[module]).values() if module in sys.modules else ()
    return any(can_switch_experts(m) for m in beside if getattr(m, "__module__", "") == module)


def _modules_of(node: fx.Node) -> list[str]:
    """Modules of transformers in the stack trace that Dynamo recorded for the node."""
    called = _MODELING.findall(node.meta.get("stack_trace") or "")
    return [f"transformers.models.{folder}.{file}" for folder, file in called]


def _top_k_of(scores: fx.Node) -> Iterator[fx.Node]:
    """The top-k calls that the scores reach within the hops of a router."""
    frontier, seen = [scores], {scores}
    for _ in range(_ROUTER_MAX_HOPS):
        users = [user for node in frontier for user in node.users if user not in seen]
        seen.update(users)
        yield from (user for user in users if target_name(user.target) == "topk")
        frontier = users


def _leaves(top: fx.Node) -> bool:
    """Whether the graph returns the indices to its caller."""
    return any(user.op == "output" for node in _indices(top) for user in node.users)


def is_router(state: GraphState, site: WeightSite) -> bool:
    """Whether scores reach a selection only through pointwise calls, views and (soft)max."""
    has_experts = any(other.kind == "experts" for other in state.sites)
    frontier, seen = [site.node], {site.node}
    if site.kind != "linear" or site.shape[0] > _ROUTER_MAX_EXPERTS:
        return False
    for _ in range(_ROUTER_MAX_HOPS):
        users = [user for node in frontier for user in node.users if user not in seen]
        if any(_is_choice(user, has_experts) for user in users):
            return True
        seen.update(users)
        frontier = [user for user in users if _keeps_scores(site, user)]
    return False


def is_codebook(state: GraphState, site: WeightSite) -> bool:
    """Whether the scores are only used to select the nearest row.

    That is so if the minimum of distances is taken, or the maximum of x·w - |w|²/2, if only the
    ranking is used, or if the chosen index looks up rows of the weight itself.
    """
    if site.kind != "linear" or site.shape[0] > _CODEBOOK_MAX_ENTRIES:
        return False
    computed, choices = _read_of(site.node)
    names = {_chooser(choice) for choice in choices}
    if not choices:
        return False
    if names <= {*_RANKINGS} and not any(other.kind == "experts" for other in state.sites):
        return True
    folder = ConstantFolder(state)

    def of_weight(node: object) -> bool:
        """Whether it is computed from the weight alone, like the norms of its rows."""
        if not isinstance(node, fx.Node) or not folder.is_constant(node):
            return False
        return not {*site.sources}.isdisjoint(folder.recipe(node)[1])

    operands = (site.contraction.bias, *(arg for node in computed for arg in node.all_input_nodes))
    nearest = not names.isdisjoint(_LEAST) or any(map(of_weight, operands))
    return nearest or any(_looks_up(choice, of_weight) for choice in choices)


def is_table_product(site: WeightSite) -> bool:
    """Whether the product reads rows of the weight: one_hot(ids) @ w, through casts and views."""
    node: object = site.contraction.x
    while isinstance(node, fx.Node) and target_name(node.target) in CASTS | MOVING:
        sources = node.all_input_nodes
        node = sources[0] if len(sources) == 1 else None  # cat joins several
    return isinstance(node, fx.Node) and target_name(node.target) == "one_hot"


def _read_of(scores: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Values computed from the scores, and the indices, ranks and comparisons made of them.

    Both are empty if the values are used otherwise: in the graph's result or in a product, also
    through where(x > 0, f(x), g(x)), min(x, c) or x * mask(x).
    """
    waiting = [scores]
    computed: dict[fx.Node, None] = {}
    choices: dict[fx.Node, None] = {}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if is_like(node, user) or not reads_values(user):
                continue
            value = user.meta.get("example_value")
            values = value if isinstance(value, tuple | list) else (value,)
            tensors = all(isinstance(part, Tensor) for part in values)
            if user.op == "output" or not tensors or has_effects(user) or _mixes_scores(user):
                return [], []
            if isinstance(value, Tensor) and not value.dtype.is_floating_point:
                if target_name(user.target) in CASTS:
                    return [], []
                choices[user] = None
            elif user not in computed:
                computed[user] = None
                waiting.append(user)
    return [*computed], [*choices]


def _chooser(choice: fx.Node) -> str:
    """The name of the choosing call: "topk" for topk(scores)[1], "argmin" for argmin(scores)."""
    call = choice.args[0] if target_name(choice.target) == "getitem" else choice
    return target_name(call.target) if isinstance(call, fx.Node) else ""


def _looks_up(choice: fx.Node, of_weight: Callable[[object], bool]) -> bool:
    """Whether the chosen indices read rows of the weight: w[ids], one_hot(ids) @ w."""
    indices = [choice, *choice.users, *(far for user in choice.users for far in user.users)]
    for index in indices:  # grows during the loop: one-hot rows, their casts, and their users
        near = index.users if target_name(index.target) in _ONE_HOT else ()
        indices += [user for user in near if user not in indices]
    tables = (arg for reader in indices for arg in reader.all_input_nodes if arg not in indices)
    return any(of_weight(table) for table in tables)


def _is_choice(node: fx.Node, top_one: bool) -> bool:
    """Whether the node is a top-k whose indices are used; a threshold uses only its values.

    If the graph has experts (`top_one`), also whether it is a maximum, as in Switch and Tutel.
    """
    name = target_name(node.target)
    if name == "topk":
        return bool(_indices(node))
    if not top_one or name not in ("max", "argmax"):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    scores = example(node.args[0] if node.args else node.kwargs.get("input"))
    return scores is not None and dim in (-1, scores.dim() - 1)


def _indices(top: fx.Node) -> list[fx.Node]:
    return [node for node in top.users if node.args[1:] == (1,) and node.users]


def _keeps_scores(site: WeightSite, node: fx.Node) -> bool:
    """Whether the node keeps one score per expert: no effects, and no product that mixes them."""
    value, scores = example(node), example(site.node)
    return not (value is None or scores is None or has_effects(node) or _mixes_scores(node))


def _mixes_scores(node: fx.Node) -> bool:
    name = target_name(node.target)
    return name in _MIXING or name.startswith("conv")
