"""5 quantize: codes and scales of every chosen site, found or made in the store by weight identity.

site: [N, K] bf16      ->   NodeWeight(recipe, plan): qweight uint8 [N, K/2], scale bf16 [N, K/G]
site: [E, N, K] bf16   ->   the same of [E * N, K]
"""

from fqcompile.distributed.ranks import progress
from fqcompile.passes.base import GraphState, part_of
from fqcompile.weights.node_weight import NodeWeight, any_packed
from fqcompile.weights.store import STORE


def quantize(state: GraphState) -> int:
    """Quantise each site that has a plan; the node's final layout follows in `lower`."""
    chosen = [(site, site.plan) for site in state.sites if site.plan is not None]
    for site, plan in progress(chosen, "fqcompile: quantising", unit="weight", delay=2):
        part = part_of(state, site, plan)
        sources = tuple(state.args[i] for i in part.inputs)
        if not any_packed(sources):
            STORE.hold(part, sources)
        site.packed = NodeWeight((part,), plan.group_size)
        state.matched.append(f"{site.name}: {plan.bits} bits, groups of {plan.group_size}")
    return len(chosen)
