"""The order of the passes. Each is timed, counted, verified in tests and, on request, dumped."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fqcompile.config import FineQuantConfig
from fqcompile.passes.base import GraphState
from fqcompile.passes.capture import capture
from fqcompile.passes.choose import choose
from fqcompile.passes.fuse import fuse
from fqcompile.passes.lower import lower
from fqcompile.passes.match import match
from fqcompile.passes.normalize import normalize
from fqcompile.passes.quantize import quantize
from fqcompile.passes.rewrite import rewrite
from fqcompile.passes.select import select
from fqcompile.passes.verify import verify
from fqcompile.report import PassRecord
from fqcompile.weights.dispatch import Variant

VERIFY = os.environ.get("FQCOMPILE_VERIFY") == "1"


def analyse(
    module: fx.GraphModule,
    args: Sequence[Any],
    config: FineQuantConfig,
    recorder: "Recorder",
    *,
    name: str = "the graph",
    changing: frozenset[int] = frozenset(),
) -> GraphState:
    """All that happens before compilation; what `explain` shows."""
    state = recorder.start("capture", lambda: capture(module, args, config))
    state.name, state.changing = name, changing
    recorder.run("normalize", state, normalize)
    recorder.run("match", state, match)
    recorder.run("choose", state, choose)
    recorder.run("quantize", state, quantize)
    recorder.run("rewrite", state, rewrite)
    recorder.run("fuse", state, fuse)
    recorder.run("select", state, select)
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
    """Runs the passes and keeps what the report says of each; `running` names the one at work.

    `state` is what they work on, also after one has failed.
    """

    keep_graphs: bool = False
    records: list[PassRecord] = field(default_factory=list)
    running: str = ""
    state: GraphState | None = None

    def start(self, name: str, make: Callable[[], GraphState]) -> GraphState:
        """The first pass, which makes the state that the others change."""
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
