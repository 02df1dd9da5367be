"""Calibrate: get the input statistics of a graph's weights by running a probe, on all ranks.

linear(x, w), linear(y, w)   ->   Calibration of w: h [K] from the rows of x and of y

Ranks of a sharded model run the probe together, or not at all. A weight that every rank holds whole
gets the same h on all of them, from the rows of all. Each shard of a sharded weight has its own h.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.distributed.ranks import agree, any_rank, rank
from fqcompile.distributed.shards import is_dtensor, local_part, rank_groups, team_of
from fqcompile.errors import ShardingError
from fqcompile.passes.probe import Probe, ProbeError
from fqcompile.passes.state import Calibrate, GraphState, WeightSite
from fqcompile.quant.calibration import Calibration, Moments, over_ranks
from fqcompile.weights.recipe import target_name

Ranks = list[list[Moments]]  # [rank][site]


def calibrator(state: GraphState) -> Calibrate:
    """For the weights of any instance; the graph is read before it is rewritten.

    A probe that fails, on the values of the call too, leaves a warning, and weights that are
    quantized from their values alone.
    """
    probe = Probe.of(state, [site for site in state.sites if not site.settled])
    asked = state.config.calibration
    assert asked is not None
    random = asked == "synthetic"

    def calibrate(
        args: Sequence[Any], wanted: Sequence[WeightSite]
    ) -> dict[WeightSite, Calibration]:
        try:
            ranks, source = _on_all_ranks(state, probe, args, wanted=bool(wanted), random=random)
        except (ProbeError, ShardingError) as error:
            if wanted:
                state.warnings.append(
                    f"{len(wanted)} weights ({wanted[0].name}, ...) are quantized from their "
                    f"values alone: running {state.name} to calibrate them failed: {error}"
                )
            alone = Calibration(asked=asked, source=f"none: {error}")
            return dict.fromkeys(wanted, alone)
        if wanted and "failed" in source:
            state.warnings.append(
                f"{len(wanted)} weights ({wanted[0].name}, ...) are calibrated by {source}"
            )
        found = {}
        for site in wanted:
            each = _of_weight(state, probe, args, site, ranks)
            each = [moments.shared() for moments in each] if site.recipe.repeats else each
            sources = [args[state.constants[source]] for source in site.sources]
            moments, row = over_ranks(each, *_sharded(args, sources, site))
            found[site] = Calibration.of(moments, asked, source, row)
        return found

    return calibrate


def _on_all_ranks(
    state: GraphState, probe: Probe, args: Sequence[Any], *, wanted: bool, random: bool
) -> tuple[Ranks, str]:
    """The moments of each rank in order; only those of this rank if the model is not sharded.

    And what they came from, see `Calibration.source`.

    Raises:
        ProbeError: the probe failed on some rank.
        RankError: the graphs of the ranks have different collectives, so the probe would hang.
    """
    groups = rank_groups(args)
    if not groups and not probe.talks:
        moments, source = probe.run(args, random=random) if wanted else ([], "")
        return [moments], source
    if not (groups and state.ranks_here):
        raise ProbeError("it communicates with other ranks, which need not run it now")
    agree(state.name, {"collectives": ", ".join(collectives(state.graph))}, groups)
    if not any_rank(f"what {state.name} is to be calibrated for", wanted, groups):
        return [], ""

    def run() -> tuple[list[Moments], str] | str:
        try:
            return probe.run(args, random=random)
        except ProbeError as error:
            return f"on rank {rank()}: {error}"

    found: Ranks = []
    source = ""
    for result in team_of(args).together(run):
        if isinstance(result, str):
            raise ProbeError(result)
        moments, source = result
        found.append(moments)
    return found, source


def collectives(graph: fx.Graph) -> Iterator[str]:
    """Those that all ranks must run, in the same order."""
    for node in graph.nodes:
        name = target_name(node.target) if node.op.startswith("call") else ""
        if "c10d" in name:
            yield name
        elif name.removeprefix("prim_") in ("redistribute", "full_tensor"):
            yield f"{name} to {node.kwargs.get('placements', node.args[1:])}"


def _of_weight(
    state: GraphState, probe: Probe, args: Sequence[Any], site: WeightSite, ranks: Ranks
) -> list[Moments]:
    """The moments on each rank, summed over all products with the weight of this site."""

    def weight(site: WeightSite) -> tuple[object, ...]:
        return (site.recipe.key, *(id(args[state.constants[source]]) for source in site.sources))

    same = [n for n, other in enumerate(probe.sites) if weight(other) == weight(site)]
    return [Moments.sum([moments[n] for n in same]) for moments in ranks]


def _sharded(args: Sequence[Any], sources: Sequence[Tensor], site: WeightSite) -> tuple[Any, int]:
    """The DTensor whose local part the weight is, if any, and the dimension of its columns."""
    whole = [d for d in args if is_dtensor(d) and any(local_part(d) is s for s in sources)]
    if len(whole) != 1 or len(sources) > 1:
        return (whole[0] if whole else None), -1
    like = torch.empty(sources[0].shape, device="meta")
    return whole[0], like.stride().index(site.recipe(like).stride(-1))
