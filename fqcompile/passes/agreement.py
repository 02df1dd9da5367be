"""What must be the same on all ranks of a sharded model, as facts to compare.

Collectives and sites in their order, and the options. Of a weight that every rank holds whole also
the plan and the kernel; of a part each rank chooses its own.
"""

from collections.abc import Iterator, Mapping

from torch import fx

from fqcompile.distributed.shards import is_part
from fqcompile.passes.base import GraphState, placeholders
from fqcompile.passes.op_nodes import argument
from fqcompile.passes.sites import WeightSite
from fqcompile.weights.recipe import target_name


def shared_facts(state: GraphState) -> Mapping[str, str]:
    """By name, in the order of the graph."""
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
