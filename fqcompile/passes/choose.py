"""3 choose: bits and granularity for each site, or the reason why it stays as it is.

What depends on the graph and the options is decided once (`settle`); what depends on the weights'
values is decided again for every instance that runs the graph (`decide`).
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fqcompile.distributed.ranks import progress
from fqcompile.distributed.shards import NOT_LOCAL, is_dtensor
from fqcompile.errors import UnquantizableWeight
from fqcompile.passes.base import GraphState, example
from fqcompile.passes.effects import has_effects
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.naming import InputName, joined_name, name_inputs
from fqcompile.passes.sites import WeightSite
from fqcompile.quant.choose import QuantPlan, scale_dtype_beside
from fqcompile.quant.validate import WEIGHT_DTYPES
from fqcompile.weights.find_or_quantize import use_logged
from fqcompile.weights.packed_weight import PackedWeight
from fqcompile.weights.recipe import target_name
from fqcompile.weights.store import STORE

Decision = QuantPlan | str


class Asked(str):
    """A reason that the options give: no failure, so that on_unsupported="error" lets it be."""


_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer, PackedWeight)
_DEVICES = ("cpu", "cuda")
# A router scores each of its experts; far fewer rows than any vocabulary that is sampled by top-k.
_ROUTER_MAX_EXPERTS = 1024
_ROUTER_MAX_HOPS = 8
_CODEBOOK_MAX_ENTRIES = 1 << 14  # vocabularies, from which a head may choose as well, are larger
_CHOICES = ("argmin", "argmax", "min", "max", "topk")
_MODELING = re.compile(r"transformers[/\\]models[/\\](\w+)[/\\](\w+)\.py")
_SWITCH_TO_GROUPED = (
    "for a model of Hugging Face call model.set_experts_implementation('grouped_mm') first"
)


NO_VALUES = "its values are not there while the graph is compiled"
LATER_VALUES = (
    "DistributedDataParallel splits the graph: set torch._dynamo.config.optimize_ddp = False, or "
    "call fqcompile.quantize_(model) before wrapping it"
)


def choose(state: GraphState) -> int:
    """Settle every site, then decide for the weights at hand; returns how many have a plan."""
    for site in state.sites:
        site.reason = _settled_reason(state, site)
        site.settled = site.reason is not None
    apply_decisions(state, decide(state, state.args))
    state.warnings += _experts_outside(state)
    hidden = [site.name for site in state.sites if site.reason == NO_VALUES]
    if hidden:
        kept = f"{len(hidden)} weights ({hidden[0]}, ...) are kept"
        state.warnings.append(f"{kept}: {NO_VALUES}; {LATER_VALUES}")
    state.matched = [f"{s.name}: {s.plan or s.reason}" for s in state.sites]
    return sum(site.plan is not None for site in state.sites)


def decide(state: GraphState, args: Sequence[Any]) -> tuple[Decision, ...]:
    """For each site that is not settled: its plan for these weights, or why there is none."""
    open_sites = [site for site in state.sites if not site.settled]
    # A sibling's weights have other names than those that the graph was captured with.
    known = name_inputs(state.constants, args)
    bar = progress(open_sites, "fqcompile: quantising", unit="weight", delay=2)
    with use_logged():
        return tuple([_decide_site(state, site, args, known) for site in bar])


def apply_decisions(state: GraphState, decisions: tuple[Decision, ...]) -> None:
    """Write the decisions onto the sites that are not settled, in their order.

    Raises:
        UnquantizableWeight: a site is kept and `on_unsupported="error"`.
    """
    open_sites = [site for site in state.sites if not site.settled]
    for site, decision in zip(open_sites, decisions, strict=True):
        if isinstance(decision, str):
            site.reason = decision
            if state.config.on_unsupported == "error" and not isinstance(decision, Asked):
                raise UnquantizableWeight(
                    f"{site.name}: {decision} (on_unsupported='error'; exclude the parameter, or "
                    "use on_unsupported='keep')"
                )
        else:
            site.plan = decision


def _decide_site(
    state: GraphState, site: WeightSite, args: Sequence[Any], known: Mapping[fx.Node, InputName]
) -> Decision:
    out = example(site.node)
    assert out is not None
    name = joined_name(known, site.sources) + site.part
    by_name = state.config.kept_by_name(name)
    if by_name is not None:
        return Asked(by_name)
    head = site.table or (
        site.kind == "linear" and any(known[source].of_head for source in site.sources)
    )
    options = state.config.site_options(name, head=head)
    sources = tuple(args[state.constants[source]] for source in site.sources)
    if out.dtype not in WEIGHT_DTYPES:
        return f"dtype {out.dtype} is not supported; use fp32, fp16 or bf16"
    refused = _trainable(state, sources) or _unsupported(sources)
    return refused or STORE.plan(site.recipe, sources, options, scale_dtype_beside(out.dtype))


def _unsupported(sources: tuple[Tensor, ...]) -> str | None:
    """What the tensor itself rules out, before any of its values is read."""
    for weight in sources:
        if weight.device.type not in _DEVICES:
            return f"the weight is on device {weight.device.type!r}; supported: cpu, cuda"
        if weight.is_quantized or weight.layout != torch.strided:
            kind = str(weight.dtype if weight.is_quantized else weight.layout)
            return f"the weight is already quantised or sparse ({kind.removeprefix('torch.')})"
        if is_dtensor(weight):
            return NOT_LOCAL
        if type(weight) not in _PLAIN_TYPES:
            return f"the weight is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in WEIGHT_DTYPES:
            return f"dtype {weight.dtype} is not supported; use fp32, fp16 or bf16"
    return None


def _trainable(state: GraphState, sources: tuple[Tensor, ...]) -> str | None:
    if not state.grad_possible or not any(weight.requires_grad for weight in sources):
        return None
    return (
        "the weight requires grad: call under torch.no_grad(), or freeze it with "
        "requires_grad_(False)"
    )


def _settled_reason(state: GraphState, site: WeightSite) -> str | None:
    by_name = state.config.kept_by_name(site.name)
    if by_name is not None and not any(state.known[source].moved for source in site.sources):
        return by_name
    if any(isinstance(state.args[state.constants[source]], FakeTensor) for source in site.sources):
        return NO_VALUES
    if any(getattr(example(node), "is_nested", False) for node in (site.x, site.node)):
        return (
            "its input is a nested tensor: multiply x.values(), the rows of all its parts, instead"
        )
    if _is_codebook(state, site) and not state.config.override_matches(site.name):
        return "codebook: its scores only choose an entry; name it in overrides to quantise it"
    if _is_router(state, site) and not state.config.override_matches(site.name):
        return "router: its top-k decides which experts run; name it in overrides to quantise it"
    if site.num_weights < state.config.min_elements:
        return f"fewer elements than min_elements={state.config.min_elements}"
    return None


def _experts_outside(state: GraphState) -> list[str]:
    """A router whose choice leaves a graph without experts chooses for those behind a break."""
    if any(site.kind == "experts" for site in state.sites):
        return []
    routers = {site.node: site.name for site in state.sites if _is_router(state, site)}
    return [
        f"the experts of router {name} are in no graph: the model picks them in a Python loop over "
        "data, which breaks the graph, so their weights stay as they are"
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


def _is_router(state: GraphState, site: WeightSite) -> bool:
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


def _is_codebook(state: GraphState, site: WeightSite) -> bool:
    """Whether the scores choose the nearest row: their least is taken, or the best of x·w - |w|²/2,
    or the rows themselves are looked up by what is chosen."""
    if site.kind != "linear" or site.shape[0] > _CODEBOOK_MAX_ENTRIES:
        return False
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
