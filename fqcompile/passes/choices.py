"""Scores that only choose: routers and codebooks, which keep their weights, and hidden experts.

softmax(linear(x, w)).topk(2)        w is a router's: its top-k decides which experts run
argmin(-2 * linear(x, w) + |w|²)     w is a codebook
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator

from torch import fx

from fqcompile.passes.base import GraphState, example
from fqcompile.passes.effects import has_effects
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.sites import WeightSite
from fqcompile.weights.recipe import target_name

# A router scores each of its experts; far fewer rows than any vocabulary that is sampled by top-k.
_ROUTER_MAX_EXPERTS = 1024
_ROUTER_MAX_HOPS = 8
_CODEBOOK_MAX_ENTRIES = 1 << 14  # vocabularies, from which a head may choose as well, are larger
_RANKINGS = ("topk", "sort", "argsort")
_CHOICES = ("argmin", "argmax", "min", "max", *_RANKINGS)
_MODELING = re.compile(r"transformers[/\\]models[/\\](\w+)[/\\](\w+)\.py")
_SWITCH_TO_GROUPED = (
    "for a model of Hugging Face call model.set_experts_implementation('grouped_mm') first"
)


def experts_outside(state: GraphState) -> list[str]:
    """A router whose choice leaves a graph without experts chooses for those behind a break."""
    if any(site.kind == "experts" for site in state.sites):
        return []
    routers = {site.node: site.name for site in state.sites if is_router(state, site)}
    return [
        f"the experts of router {name} are not in its graph: the model picks them in a Python loop "
        "over data, which breaks the graph; of their weights only those are quantized that a later "
        "graph multiplies with"
        f"{way_out(_modules_of(node))}"
        for node, name in routers.items()
        if any(_leaves(top) for top in _top_k_of(node))
    ]


def way_out(modules: Iterable[str]) -> str:
    """How to get experts into a graph, after a reason; nothing where transformers has no switch.

    Args:
        modules: names of those that the model is written in, as far as they are known.
    """
    known = [name for name in modules if name.startswith("transformers.models.")]
    return "" if known and not any(map(_has_switch, known)) else f"; {_SWITCH_TO_GROUPED}"


def _has_switch(module: str) -> bool:
    """Each model of transformers knows whether those that are written beside it have it."""
    beside = vars(sys.modules[module]).values() if module in sys.modules else ()
    models = [m for m in beside if hasattr(m, "_can_set_experts_implementation")]
    return any(m._can_set_experts_implementation() for m in models if m.__module__ == module)


def _modules_of(node: fx.Node) -> list[str]:
    """Those of transformers whose code called this, by what Dynamo has recorded of the call."""
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
    """Whether the graph gives the indices back to its caller."""
    indices = [node for node in top.users if node.args[1:] == (1,)]
    return any(user.op == "output" for node in indices for user in node.users)


def is_router(state: GraphState, site: WeightSite) -> bool:
    """Whether the scores flow into a choice through pointwise calls, views and (soft)max alone."""
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
    """Whether the scores choose the nearest row: their least is taken, or the best of x·w - |w|²/2,
    the rows themselves are looked up by what is chosen, or nothing is read but their ranks."""
    if site.kind != "linear" or site.shape[0] > _CODEBOOK_MAX_ENTRIES:
        return False
    if _only_ranks(site) and not any(other.kind == "experts" for other in state.sites):
        return True
    folder = ConstantFolder(state)

    def of_weight(node: object) -> bool:
        """Whether it is computed from the weight alone, as the norms of its rows are."""
        if not isinstance(node, fx.Node) or not folder.is_constant(node):
            return False
        return not {*site.sources}.isdisjoint(folder.recipe(node)[1])

    nearest = of_weight(site.bias)
    frontier, seen = [site.node], {site.node}
    for _ in range(_ROUTER_MAX_HOPS):
        users = [user for node in frontier for user in node.users if user not in seen]
        seen.update(users)
        frontier = [user for user in users if _keeps_scores(site, user)]
        chosen = [user for user in users if target_name(user.target) in _CHOICES]
        if any(target_name(user.target) in ("argmin", "min") for user in chosen):
            return True
        if chosen and (nearest or any(_looks_up(user, of_weight) for user in chosen)):
            return True
        nearest |= any(of_weight(arg) for user in frontier for arg in user.all_input_nodes)
    return False


def _only_ranks(site: WeightSite) -> bool:
    """Whether all that is read of the scores is the indices of a top-k or of a sort."""
    waiting, ranked = [site.node], False
    while waiting:
        for user in waiting.pop().users:
            name = target_name(user.target)
            if name in _RANKINGS:
                ranked = True
                if name != "argsort" and any(read.args[1:] != (1,) for read in user.users):
                    return False
            elif user.op == "output" or not _keeps_scores(site, user):
                return False
            else:
                waiting.append(user)
    return ranked


def _looks_up(choice: fx.Node, of_weight: Callable[[object], bool]) -> bool:
    """Whether rows of the weight are read by the index that was chosen, or by its indices."""
    indices = {choice, *choice.users, *(far for user in choice.users for far in user.users)}
    tables = (arg for reader in indices for arg in reader.all_input_nodes if arg not in indices)
    return any(of_weight(table) for table in tables)


def _is_choice(node: fx.Node, top_one: bool) -> bool:
    """A top-k; beside experts (`top_one`) also the maximum of the scores, as in Switch, Tutel."""
    name = target_name(node.target)
    if not top_one or name not in ("max", "argmax"):
        return name == "topk"
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    scores = example(node.args[0] if node.args else node.kwargs.get("input"))
    return scores is not None and dim in (-1, scores.dim() - 1)


def _keeps_scores(site: WeightSite, node: fx.Node) -> bool:
    """Same number of scores per row: not yet multiplied with anything that mixes them."""
    value, scores = example(node), example(site.node)
    if value is None or scores is None or has_effects(node):
        return False
    return target_name(node.target) not in ("linear", "matmul", "bmm", "mm", "addmm", "einsum")
