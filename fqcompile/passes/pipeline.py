"""Run the passes in order. Each is timed, counted, verified in tests and, on request, dumped."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fqcompile.config import FineQuantConfig
from fqcompile.distributed.shards import is_part
from fqcompile.errors import GraphInvariantError
from fqcompile.options import switched_on
from fqcompile.passes.calibrate import collectives
from fqcompile.passes.capture import capture
from fqcompile.passes.fuse import fuse
from fqcompile.passes.lower import lower
from fqcompile.passes.match import match
from fqcompile.passes.normalize import normalize
from fqcompile.passes.op_nodes import argument, is_linear, is_quantized
from fqcompile.passes.plan import plan
from fqcompile.passes.rewrite import rewrite
from fqcompile.passes.select import select
from fqcompile.passes.state import GraphState, WeightSite, example, placeholders
from fqcompile.report import PassRecord
from fqcompile.torch_compat import is_erased
from fqcompile.weights.dispatch import Variant

VERIFY = switched_on("FQCOMPILE_VERIFY", False)

# In order, between `capture`, which creates the state, and `lower`, which compiles it.
PASSES: dict[str, Callable[[GraphState], int]] = {
    "normalize": normalize,
    "match": match,
    "plan": plan,
    "rewrite": rewrite,
    "fuse": fuse,
    "select": select,
}


def analyze(
    module: fx.GraphModule,
    args: Sequence[Any],
    config: FineQuantConfig,
    recorder: "Recorder",
    *,
    name: str = "the graph",
    changing: frozenset[int] = frozenset(),
    ranks_here: bool = True,
) -> GraphState:
    """Run all passes before `lower`; `explain` shows their result."""
    state = recorder.start("capture", lambda: capture(module, args, config))
    state.name, state.changing, state.ranks_here = name, changing, ranks_here
    for word, step in PASSES.items():
        recorder.run(word, state, step)
    return state


def compile_state(state: GraphState, args: Sequence[Any], recorder: "Recorder") -> Variant:
    """The last pass: the rewritten graph, compiled."""
    variants: list[Variant] = []

    def lower_once(state: GraphState) -> int:
        variants.append(lower(state, args))
        return len(state.packed)

    recorder.run("lower", state, lower_once)
    return variants[0]


@dataclass
class Recorder:
    """Runs the passes and records each for the report.

    `running` is the name of the current pass, and `state` what the passes work on; both stay set
    if a pass fails.
    """

    keep_graphs: bool = False
    records: list[PassRecord] = field(default_factory=list)
    running: str = ""
    state: GraphState | None = None

    def start(self, name: str, make: Callable[[], GraphState]) -> GraphState:
        """Run the first pass, which creates the state that the others change."""
        self.running = name
        begin = time.perf_counter()
        self.state = state = make()
        seconds = time.perf_counter() - begin
        names = tuple(state.names.values())
        self.records.append(PassRecord(name, seconds, len(names), names, None, self._text(state)))
        return state

    def run(self, name: str, state: GraphState, step: Callable[[GraphState], int]) -> None:
        self.running, state.matched = name, []
        before = self._text(state)
        begin = time.perf_counter()
        count = step(state)
        seconds = time.perf_counter() - begin
        matched = tuple(state.matched)
        self.records.append(PassRecord(name, seconds, count, matched, before, self._text(state)))
        if VERIFY:
            verify(state, name)

    def _text(self, state: GraphState) -> str | None:
        return state.module.print_readable(print_output=False) if self.keep_graphs else None


def verify(state: GraphState, after: str) -> None:
    """Raise GraphInvariantError, which names the pass and the node, if a rule is broken."""

    def check(condition: bool, node: object, rule: str) -> None:
        if not condition:
            raise GraphInvariantError(f"after {after}: {node}: {rule}")

    state.graph.lint()
    inputs = placeholders(state.graph)
    first_call = next(
        (n for n in state.graph.nodes if n.op not in ("placeholder", "get_attr")), None
    )
    for node in inputs:
        check(first_call is None or node < first_call, node, "inputs come before all calls")
    calls = [node for node in state.graph.nodes if is_quantized(node)]
    check(set(calls) == set(state.packed), calls, "each op has exactly one packed weight")
    place = {node: index for index, node in enumerate(inputs)}
    for op, weight in state.packed.items():
        codes, scale = (place.get(argument(op, name), -2) for name in ("qweight", "scale"))
        check(0 <= codes == scale - 1, op, "reads two inputs of its own, codes before scales")
        rows = argument(op, "n") * (2 if argument(op, "gated") else 1)
        check(rows == weight.rows, op, f"n and gated say {rows} rows, its spec {weight.rows}")
        check(is_linear(op) == (weight.experts == 0), op, "one matrix or experts, as its spec")
        check(argument(op, "group_size") == weight.group_size, op, "group size as in its spec")
        out = example(op)
        check(out is not None and out.shape[-1] == argument(op, "n"), op, "result has N columns")
    for site in state.sites:
        done = site.op is not None and not is_erased(site.op)
        check(site.op is None or done, site.name, "a rewritten site names a live op")
        check(site.plan is None or site.reason is None, site.name, "a plan or a reason, not both")


def shared_facts(state: GraphState) -> Mapping[str, str]:
    """Facts that must agree on all ranks of a sharded model, by name, in graph order.

    Collectives and sites in their order, and the options. Of a weight that every rank holds whole
    also the plan and the kernel; of a part each rank chooses its own.
    """
    facts = {"outcome": "quantized"}
    facts |= {f"option {name}": str(value) for name, value in state.config.as_dict().items()}
    del facts["option debug_dir"]  # each rank may have its own
    facts["collectives"] = ", ".join(collectives(state.graph))
    # the inputs of packed weights come after those of the graph's own arguments
    inputs = zip(placeholders(state.graph), state.args, strict=False)
    parts = {state.names[n] for n, arg in inputs if is_part(arg)}
    for number, site in enumerate(state.sites):
        facts[f"site {number}"] = f"{site.kind} {site.name}"
        if not parts & {state.names[source] for source in site.sources}:
            facts[site.name] = _choice(site)
    return facts


def _choice(site: WeightSite) -> str:
    if site.plan is None:
        return f"kept: {site.reason}"
    plan, kernel = site.plan, None if site.op is None else argument(site.op, "kernel")
    return f"{tuple(map(str, plan.choice))}, kernel {kernel}"
