"""4 plan: choose bits, granularity, codes and scales of each site, or the reason to skip it.

site: [N, K] bf16      ->   QuantPlan; in the store qweight uint8 [N, K/2], scale bf16 [N, K/G]
site: [E, N, K] bf16   ->   the same with [E, ...]

Computing the error of a plan requires quantizing, so the store keeps the result by the identity of
the weight. Decisions that depend on the graph and the options are made once (`settled`); decisions
that depend on values are made again for other instances that run the graph (`decide`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fqcompile.config import ROUTER, SiteOptions
from fqcompile.distributed.ranks import progress
from fqcompile.distributed.shards import NOT_LOCAL, is_dtensor
from fqcompile.errors import UnquantizableWeight
from fqcompile.kernels.registry import dequantized_because, spec_of
from fqcompile.passes.calibrate import calibrator
from fqcompile.passes.choices import experts_outside, is_codebook, is_router, is_table_product
from fqcompile.passes.kept import TABLE
from fqcompile.passes.naming import InputName, joined_name
from fqcompile.passes.state import GraphState, WeightSite, example
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.checks import OTHER_DTYPE, WEIGHT_DTYPES
from fqcompile.quant.choose import QuantPlan, scale_dtype_beside
from fqcompile.tensor.format import Format
from fqcompile.torch_compat import FakeTensor
from fqcompile.weights.disk_cache import disk_cache
from fqcompile.weights.fingerprint import fingerprint
from fqcompile.weights.node_weight import any_packed
from fqcompile.weights.parameter import PackedWeight
from fqcompile.weights.recipe import WeightRecipe
from fqcompile.weights.store import STORE

log = logging.getLogger("fqcompile")

Decision = QuantPlan | str
PlanKey = tuple[int, int, str, str, torch.dtype] | None
Key = tuple[PlanKey, ...]


class Asked(str):
    """A skip reason that follows from the options: not an error with on_unsupported="error"."""


_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer, PackedWeight)
_DEVICES = ("cpu", "cuda")
CHANGING = (
    "the weight was changed or replaced in each of the last calls, and would be quantized again in "
    "every call"
)
NO_VALUES = "its values are not available while the graph is compiled"
LATER_VALUES = (
    "DistributedDataParallel splits the graph: set torch._dynamo.config.optimize_ddp = False, or "
    "call fqcompile.quantize_(model) before wrapping it"
)


def plan(state: GraphState) -> int:
    """Settle every site, then decide for the current weights; return the number of plans."""
    for site in state.sites:
        site.reason = _settled_reason(state, site)
        site.settled = site.reason is not None
    weights = tuple(state.args[i] for i in weight_inputs(state))
    dense = [weight for weight in weights if not any_packed([weight])]
    if state.config.calibration is not None and dense:
        state.calibrate = calibrator(state)
    state.decided_for = fingerprint(weights)
    apply_decisions(state, decide(state, state.args, state.known, state.changing))
    state.ranks_here = False
    state.warnings += experts_outside(state)
    hidden = [site.name for site in state.sites if site.reason == NO_VALUES]
    if hidden:
        kept = f"{len(hidden)} weights ({hidden[0]}, ...) are kept"
        state.warnings.append(f"{kept}: {NO_VALUES}; {LATER_VALUES}")
    state.matched = [f"{site.name}: {_told(site)}" for site in state.sites]
    return sum(site.plan is not None for site in state.sites)


def _told(site: WeightSite) -> str | None:
    found = site.plan
    return site.reason if found is None else f"{found.bits} bits, groups of {found.group_size}"


def weight_inputs(state: GraphState) -> tuple[int, ...]:
    """The positions of the arguments on whose values plans depend."""
    open_sites = [site for site in state.sites if not site.settled]
    return tuple(sorted({state.constants[s] for site in open_sites for s in site.sources}))


def decide(
    state: GraphState,
    args: Sequence[Any],
    known: Mapping[fx.Node, InputName],
    changing: frozenset[int] = frozenset(),
) -> tuple[Decision, ...]:
    """For each site that is not settled: its plan for these weights, or the skip reason.

    `known`: the names of the weights, which differ between instances that run the same graph.
    `changing`: the inputs whose weights change in every call.
    """
    open_sites = [site for site in state.sites if not site.settled]
    asked = [_asked(state, site, args, known, changing) for site in open_sites]
    pairs = list(zip(open_sites, asked, strict=True))
    calibrations = _calibrations(state, args, dict(pairs))
    bar = progress(pairs, "fqcompile: quantizing", unit="weight", delay=2)
    with _use_logged():
        return tuple(
            [a if isinstance(a, str) else STORE.plan(*a, calibrations.get(s)) for s, a in bar]
        )


def _calibrations(
    state: GraphState, args: Sequence[Any], asked: Mapping[WeightSite, "_Ask | str"]
) -> dict[WeightSite, Calibration]:
    """What each weight is quantized with: what it was before, or what the graph is run for now.

    Errors of 8 bits are too small to be worth it, and packed weights have their codes.
    """
    option, run = state.config.calibration, state.calibrate
    if option is None or run is None:
        return {}
    found: dict[WeightSite, Calibration | None] = {}
    for site, ask in asked.items():
        if not (isinstance(ask, str) or ask.options.bits == 8 or any_packed(ask.sources)):
            found[site] = STORE.calibration(ask.recipe, ask.sources, option)
    made = run(args, [site for site, known in found.items() if known is None])
    return {site: known or made[site] for site, known in found.items()}


@contextmanager
def _use_logged() -> Iterator[None]:
    """Log at exit how many weights were found on disk."""
    found = disk_cache()
    before = (found.hits, found.misses) if found else (0, 0)
    yield
    if found:
        hits, misses = found.hits - before[0], found.misses - before[1]
        if hits or misses:
            log.info(
                "%d of %d weights were found quantized in %s", hits, hits + misses, found.directory
            )


def key_of(decisions: Sequence[Decision]) -> Key:
    """A key that is equal if the rewritten graphs are equal."""
    return tuple(None if isinstance(d, str) else d.choice for d in decisions)


def serves(offered: PlanKey, asked: PlanKey, bounded: bool) -> bool:
    """Whether a site whose weight asks for one plan may be quantized by another one."""
    return offered is None or offered == asked or (asked is not None and not bounded)


def distance(plans: Key, asked: Key) -> tuple[int, int]:
    """Sites that would be coarser than they ask for; then how coarse or large all are."""
    pairs = [(p, a) for p, a in zip(plans, asked, strict=True) if a is not None]
    coarser = [p is not None and (p[0] < a[0] or p[1] > a[1]) for p, a in pairs]
    return sum(coarser), sum(1 << 20 if p is None else p[1] for p, _ in pairs)


def apply_decisions(state: GraphState, decisions: tuple[Decision, ...]) -> None:
    """Write the decisions onto the sites that are not settled, in their order.

    Raises:
        UnquantizableWeight: a site is skipped and `on_unsupported="error"`.
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


class _Ask(NamedTuple):
    """A request to the store to plan a weight."""

    recipe: WeightRecipe
    sources: tuple[Tensor, ...]
    options: SiteOptions
    scale_dtype: torch.dtype


def _asked(
    state: GraphState,
    site: WeightSite,
    args: Sequence[Any],
    known: Mapping[fx.Node, InputName],
    changing: frozenset[int],
) -> _Ask | str:
    """What to plan for a site, or the reason why it is skipped."""
    out = example(site.node)
    assert out is not None
    name = joined_name(known, site.sources) + site.part
    by_name = state.config.kept_by_name(name)
    if by_name is not None:
        return Asked(by_name)
    head = bool(site.tables) or (
        site.kind == "linear" and any(known[source].of_head for source in site.sources)
    )
    options = state.config.site_options(name, head=head)
    inputs = [state.constants[source] for source in site.sources]
    sources = tuple(args[i] for i in inputs)
    if not changing.isdisjoint(inputs):
        return CHANGING
    if out.dtype not in WEIGHT_DTYPES:
        return OTHER_DTYPE.format(out.dtype)
    refused = _trainable(state, sources) or _unsupported(sources)
    if not (refused or any_packed(sources) or state.config.override_matches(name)):
        refused = _slow(site, options, out.dtype, sources[0].device)
    return refused or _Ask(site.recipe, sources, options, scale_dtype_beside(out.dtype))


def _slow(
    site: WeightSite, options: SiteOptions, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why 4 or 8 bits would make a GPU's calls slower; the dense weight stays in memory anyway."""
    *stack, n, k = site.shape
    group = options.granularity if isinstance(options.granularity, int) else k
    experts = stack[0] if stack else 0
    form = Format(options.bits, min(group, k), n, k, experts, levels=options.levels)
    scale_dtype = scale_dtype_beside(dtype)
    reason = dequantized_because(spec_of(form, dtype, scale_dtype, device, None))
    return reason and (
        f"{reason}, so each call would dequantize the whole weight; to save memory, call "
        "fqcompile.quantize_, or name it in overrides"
    )


def _unsupported(sources: tuple[Tensor, ...]) -> str | None:
    """Why a tensor cannot be quantized, found without reading its values; or None."""
    for weight in sources:
        if weight.device.type not in _DEVICES:
            return f"the weight is on device {weight.device.type!r}; supported: cpu, cuda"
        if weight.is_quantized or weight.layout != torch.strided:
            kind = str(weight.dtype if weight.is_quantized else weight.layout)
            return f"the weight is already quantized or sparse ({kind.removeprefix('torch.')})"
        if is_dtensor(weight):
            return NOT_LOCAL
        if type(weight) not in _PLAIN_TYPES:
            return f"the weight is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in WEIGHT_DTYPES:
            return OTHER_DTYPE.format(weight.dtype)
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
    if any(getattr(example(node), "is_nested", False) for node in (site.contraction.x, site.node)):
        return (
            "its input is a nested tensor: multiply x.values(), the rows of all its parts, instead"
        )
    if is_table_product(site) and not state.config.override_matches(site.name):
        return TABLE
    if is_codebook(state, site) and not state.config.override_matches(site.name):
        return "codebook: its scores only choose an entry; name it in overrides to quantize it"
    if is_router(state, site) and not state.config.override_matches(site.name):
        return ROUTER
    return state.config.kept_by_size(site.num_weights)
