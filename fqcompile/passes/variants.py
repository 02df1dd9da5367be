"""GraphCompiler: one captured graph, compiled once for each set of plans that its weights ask for.

Dynamo hands the same graph to every instance of a class. Instances whose weights lead to the same
plans share a variant; others get their own, up to a limit on compilations; beyond it, weights are
quantized by existing plans. If a pass fails, the graph is compiled unmodified, and a warning names
the pass and the error.
"""

import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from fqcompile.config import FineQuantConfig
from fqcompile.distributed.ranks import agree
from fqcompile.distributed.shards import rank_groups
from fqcompile.errors import PlanDoesNotFit, RankError
from fqcompile.locks import fork_safe
from fqcompile.passes.lower import compile_inner
from fqcompile.passes.naming import InputName
from fqcompile.passes.pipeline import Recorder, analyze, compile_state, shared_facts
from fqcompile.passes.plan import Decision, Key, decide, distance, key_of, serves, weight_inputs
from fqcompile.passes.sharded import localize, refuse_fsdp
from fqcompile.passes.state import GraphState, copy_module
from fqcompile.passes.summary import (
    Row,
    read_as_it_comes,
    rows_beside,
    rows_of,
    warnings_of,
)
from fqcompile.report import (
    CompileReport,
    Plan,
    amend,
    dump_report,
    installed_version,
    is_traced,
    record,
    trace_report,
)
from fqcompile.torch_compat import DYNAMO_REQUESTS, TracingContext, compile_lock, tracing
from fqcompile.weights.dispatch import Inner, Variant, WeightDispatch, forget
from fqcompile.weights.fingerprint import ATTEMPTS, fingerprint
from fqcompile.weights.store import STORE

_reporting = fork_safe(threading.RLock())  # threads may bring other weights to one graph
log = logging.getLogger("fqcompile")
_graph_numbers = itertools.count()
# At most this many sets of plans are compiled for one graph; Dynamo's own recompile_limit does not
# count them.
MOST_VARIANTS = 8
_VERSIONS = {name: installed_version(name) for name in ("fqcompile", "torch")}


def compile_graph(
    module: fx.GraphModule, args: Sequence[Any], config: FineQuantConfig, name: str | None = None
) -> Inner:
    """The callable that Dynamo gets for one graph, with the graph's own arguments.

    Raises:
        RankError: other ranks of a sharded model compile something else, or do not answer.
        ShardingError: the model is wrapped by FSDP.
    """
    refuse_fsdp(module.graph)
    local = localize(module, args)
    module, args = local.module, local.arguments(args)
    return local.wrap(_compiled(module, args, config, name or f"graph_{next(_graph_numbers)}"))


def _compiled(
    module: fx.GraphModule, args: Sequence[Any], config: FineQuantConfig, name: str
) -> Inner:
    forget(STORE.changed(arg for arg in args if isinstance(arg, Tensor)))
    graph = GraphCompiler(module, config, name)
    first = graph.compile_variant(args)
    inputs = graph.weight_inputs()
    if not inputs:
        return first.variant.inner
    detect = config.weight_updates == "detect"
    dispatch = WeightDispatch(inputs, graph.variant_for, detect)
    dispatch.bind(args, first.variant if graph.is_decided_for(args) else None)
    return dispatch


@dataclass
class _Compiled:
    """A variant, the key of the plans it is for, the rows of its first weights, and its report."""

    key: Key
    variant: Variant
    rows: Sequence[Row]
    report: CompileReport


class GraphCompiler:
    """See the module's docstring. `variant_for` is called when new weights arrive."""

    def __init__(self, module: fx.GraphModule, config: FineQuantConfig, name: str) -> None:
        self._module = module  # never edited: each variant is compiled from a copy
        self._config = config
        self._name = name
        self._context = TracingContext.try_get()
        self._compiled: dict[Key, _Compiled] = {}
        self._analyzed: GraphState | None = None
        self._agreed = False
        self._said: set[str] = set()

    def weight_inputs(self) -> tuple[int, ...]:
        """Arguments on which the choice of a variant depends."""
        return () if self._analyzed is None else weight_inputs(self._analyzed)

    def is_decided_for(self, args: Sequence[Any]) -> bool:
        """Whether the first variant's plans are for these weights as they are now."""
        assert self._analyzed is not None
        weights = tuple(args[i] for i in self.weight_inputs())
        return self._analyzed.decided_for == fingerprint(weights)

    def variant_for(self, args: Sequence[Any], changing: frozenset[int]) -> Variant:
        """The variant whose plans fit the weights in `args`, compiled if there is none yet.

        The inputs `changing` are read dense. Compiling takes the lock of torch's compiler, as
        Dynamo does, because any thread may get here while others compile.
        """
        state = self._analyzed
        assert state is not None
        known, told = state.known_in(args), len(state.warnings)
        decisions = decide(state, args, known, changing)
        key = key_of(decisions)
        found = self._compiled.get(key)
        if found is None:
            with compile_lock, tracing(self._context):
                found = self._compiled.get(key) or self._add(args, key, changing)
        for text in state.warnings[told:]:
            self._say_once(found, text)
        if changing:
            self._say_once(found, read_as_it_comes(state, changing))
        self._tell(found, {i: known[node] for node, i in state.named.items()}, decisions)
        return found.variant

    def _add(self, args: Sequence[Any], key: Key, changing: frozenset[int]) -> _Compiled:
        if len(self._compiled) < MOST_VARIANTS:
            return self.compile_variant(args, changing, key)
        text = (
            f"{self._name}: its instances ask for more than {MOST_VARIANTS} different sets of "
            "plans, and each set is compiled separately: further instances "
        )
        found = self._nearest(args, key)
        if found is None:
            everything_kept: Key = (None,) * len(key)
            found = self._compiled.get(everything_kept)
            text += (
                "stay dense if no existing set meets their error_budget; granularity=128, or "
                "another number, without error_budget makes all instances share one set"
            )
            found = found or self._unquantized(args, Recorder(), text, everything_kept)
        else:
            text += (
                "are quantized by the finest existing set that fits; granularity=128, or another "
                "number, makes all instances share one set"
            )
        self._say_once(found, text)
        return found

    def _nearest(self, args: Sequence[Any], key: Key) -> _Compiled | None:
        """The compiled variant whose plans serve these weights best, or None.

        One that is at least as fine as the weights ask for, if there is one; else the finest. A
        site whose error an option bounds gets no other plan than its own.
        """
        assert self._analyzed is not None
        options = [
            self._config.site_options(site.name, head=site.head)
            for site in self._analyzed.sites
            if not site.settled
        ]
        bounded = [option.error_budget is not None for option in options]
        possible = [
            found
            for found in list(self._compiled.values())
            if all(map(serves, found.key, key, bounded))
        ]
        for found in sorted(possible, key=lambda found: distance(found.key, key)):
            with suppress(PlanDoesNotFit):
                found.variant.pack(args)
                return found
        return None

    def compile_variant(
        self, args: Sequence[Any], changing: frozenset[int] = frozenset(), key: Key = ()
    ) -> _Compiled:
        """Run the pipeline for these weights; if it fails, compile the unmodified graph.

        `key`: the plans that were asked for, under which a failure is stored.
        """
        start = time.perf_counter()
        recorder = Recorder(keep_graphs=self._config.debug_dir is not None or is_traced())
        try:
            state, rows, variant = self._run(args, changing, recorder)
        except RankError:  # which all ranks have
            raise
        except Exception as error:
            self._agree(args, {"outcome": f"pass {recorder.running!r} failed with {error!r}"})
            if self._config.on_unsupported == "error" or isinstance(error, DYNAMO_REQUESTS):
                raise
            text = (
                f"{self._name} runs unquantized: pass {recorder.running!r} failed with "
                f"{type(error).__name__}: {error}"
            )
            log.warning(text, exc_info=log.isEnabledFor(logging.DEBUG))
            return self._unquantized(args, recorder, text, key)
        state.args = ()  # the example weights must not outlive their model
        self._analyzed = self._analyzed or state
        key = key_of(tuple(s.plan or str(s.reason) for s in state.sites if not s.settled))
        warnings = warnings_of(state)
        for text in warnings:
            log.warning(text)
        return self._keep(key, variant, recorder, rows, warnings, time.perf_counter() - start)

    def _run(
        self, args: Sequence[Any], changing: frozenset[int], recorder: Recorder
    ) -> tuple[GraphState, Sequence[Row], Variant]:
        """Run all passes, again if another thread wrote to a weight in between."""
        run = partial(analyze, self._module, args, self._config, recorder)
        for attempt in range(ATTEMPTS):
            recorder.records.clear()
            try:
                first = not (self._agreed or attempt)
                state = run(name=self._name, changing=changing, ranks_here=first)
                rows = list(rows_of(state).values())  # sites first, then weights that no site reads
                self._agree(args, shared_facts(state))
                return state, rows, compile_state(state, args, recorder)
            except PlanDoesNotFit:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _agree(self, args: Sequence[Any], facts: Mapping[str, str]) -> None:
        """Check once that all ranks of a sharded model agree; later variants may differ by rank."""
        if not self._agreed:
            self._agreed = True
            agree(self._name, facts, rank_groups(args))

    def _unquantized(
        self, args: Sequence[Any], recorder: Recorder, text: str, key: Key
    ) -> _Compiled:
        module, _ = copy_module(self._module)
        inner = compile_inner(module, args, self._config)
        variant = Variant(inner, tuple(range(len(args))), lambda args: ())
        return self._keep(key, variant, recorder, (), (text,), 0.0)

    def _keep(
        self,
        key: Key,
        variant: Variant,
        recorder: Recorder,
        rows: Sequence[Row],
        warnings: tuple[str, ...],
        seconds: float,
    ) -> _Compiled:
        number = len(self._compiled)
        name = f"{self._name}_variant_{number}" if number else self._name
        plan = Plan(tuple(row.site for row in rows), self._config.as_dict())
        passes = tuple(recorder.records)
        report = CompileReport(name, plan, passes, warnings, _VERSIONS, seconds)
        log.info("%s: %s", name, plan.totals)
        log.debug("%s", report)
        record(report)
        trace_report(report)
        if self._config.debug_dir is not None:
            dump_report(report, self._config.debug_dir)
        self._compiled[key] = found = _Compiled(key, variant, rows, report)
        return found

    def _say_once(self, found: _Compiled, text: str) -> None:
        """Log the warning and add it to the report of the variant, once per graph."""
        if text not in self._said:
            self._said.add(text)
            log.warning(text)
            with _reporting:
                found.report = amend(found.report, warnings=(*found.report.warnings, text))

    def _tell(
        self, found: _Compiled, known: Mapping[int, InputName], decisions: Sequence[Decision]
    ) -> None:
        """Add rows to the report for weights that it does not name yet: those of equal layers."""
        with _reporting:
            plan = found.report.plan
            new = rows_beside(found.rows, {s.name for s in plan.sites}, known, decisions)
            if new:
                found.report = amend(found.report, plan=replace(plan, sites=plan.sites + new))
                if self._config.debug_dir is not None:
                    dump_report(found.report, self._config.debug_dir)
