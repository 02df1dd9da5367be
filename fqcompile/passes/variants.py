"""GraphCompiler: one captured graph, compiled once for each set of plans that its weights ask for.

Dynamo hands the same graph to every instance of a class. Instances whose weights lead to the same
plans share a variant; others get their own, up to a number that bounds how much is compiled in
calls; beyond it they are quantised by plans that there are. A failure inside the passes never loses
the model: the graph is compiled as it was, and a warning says which pass failed and why.
"""

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.config import FineQuantConfig
from fqcompile.distributed.agreement import agree
from fqcompile.distributed.shards import rank_groups
from fqcompile.errors import PlanDoesNotFit, RankError
from fqcompile.passes.base import GraphState, copy_module
from fqcompile.passes.choose import Decision, decide
from fqcompile.passes.lower import compile_inner
from fqcompile.passes.pipeline import Recorder, analyse, compile_state
from fqcompile.passes.sharded import localize, refuse_fsdp
from fqcompile.passes.summary import plan_of, read_as_it_comes, shared_facts, warnings_of
from fqcompile.report import (
    CompileReport,
    Plan,
    dump_report,
    is_traced,
    record,
    trace_report,
    with_warning,
)
from fqcompile.torch_compat import DYNAMO_REQUESTS, TracingContext, compile_lock, tracing
from fqcompile.weights.dispatch import Inner, Variant, WeightDispatch, forget
from fqcompile.weights.fingerprint import ATTEMPTS
from fqcompile.weights.store import STORE

log = logging.getLogger("fqcompile")
_graph_numbers = itertools.count()
# More than this many sets of plans are not compiled for one graph; Dynamo's own limit of
# recompilations does not see them.
MOST_VARIANTS = 8
PlanKey = tuple[int, int, str, torch.dtype] | None
Key = tuple[PlanKey, ...]
_VERSIONS = {name: version(name) for name in ("fqcompile", "torch")}


def compile_graph(
    module: fx.GraphModule, args: Sequence[Any], config: FineQuantConfig, name: str | None = None
) -> Inner:
    """What Dynamo gets back for one graph: a callable with the graph's own arguments.

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
    weight_inputs = graph.weight_inputs()
    if not weight_inputs:
        return first.variant.inner
    detect = config.weight_updates == "detect"
    dispatch = WeightDispatch(weight_inputs, graph.variant_for, detect)
    dispatch.bind(args)
    return dispatch


@dataclass
class _Compiled:
    """A variant, the key of the plans it is for, and its report."""

    key: Key
    variant: Variant
    report: CompileReport


class GraphCompiler:
    """See the module's docstring. `variant_for` is what runs when unseen weights come in."""

    def __init__(self, module: fx.GraphModule, config: FineQuantConfig, name: str) -> None:
        self._module, _ = copy_module(module)
        self._config = config
        self._name = name
        self._context = TracingContext.try_get()
        self._compiled: dict[Key, _Compiled] = {}
        self._analysed: GraphState | None = None
        self._agreed = False
        self._said: set[str] = set()

    def weight_inputs(self) -> tuple[int, ...]:
        """Arguments on which the choice of a variant depends."""
        if self._analysed is None:
            return ()
        constants = self._analysed.constants
        open_sites = [site for site in self._analysed.sites if not site.settled]
        return tuple(sorted({constants[s] for site in open_sites for s in site.sources}))

    def variant_for(self, args: Sequence[Any], changing: frozenset[int]) -> Variant:
        """The variant whose plans fit the weights in `args`, compiled if there is none yet.

        The inputs `changing` are read as they come. Compiling takes the lock of torch's compiler,
        as Dynamo does: any thread may come here while others compile.
        """
        state = self._analysed
        assert state is not None
        key = _key(decide(state, args, changing))
        found = self._compiled.get(key)
        if found is None:
            with compile_lock, tracing(self._context):
                found = self._compiled.get(key) or self._add(args, key, changing)
        if changing:
            self._say_once(found, read_as_it_comes(state, changing))
        return found.variant

    def _add(self, args: Sequence[Any], key: Key, changing: frozenset[int]) -> _Compiled:
        if len(self._compiled) < MOST_VARIANTS:
            return self.compile_variant(args, changing, key)
        text = (
            f"{self._name}: its instances ask for more than {MOST_VARIANTS} different sets of "
            "plans, and each is a compilation: those to come "
        )
        found = self._nearest(args, key)
        if found is None:
            everything_kept: Key = (None,) * len(key)
            found = self._compiled.get(everything_kept)
            text += (
                "stay as they are where no plan that there is meets their error_budget; "
                "granularity=128, or another number, without error_budget is one plan for all"
            )
            found = found or self._unquantized(args, Recorder(), text, everything_kept)
        else:
            text += (
                "are quantised by the finest that there is for their weights; granularity=128, or "
                "another number, is one plan for all"
            )
        self._say_once(found, text)
        return found

    def _nearest(self, args: Sequence[Any], key: Key) -> _Compiled | None:
        """What is compiled for plans that these weights can be quantised by too.

        At least as fine as they ask for, where there is such a one; else the finest. Where an
        option bounds the error, no other plan than theirs.
        """
        assert self._analysed is not None
        options = [
            self._config.site_options(site.name, head=site.head)
            for site in self._analysed.sites
            if not site.settled
        ]
        bounded = [option.error_budget is not None for option in options]
        possible = [
            found
            for found in list(self._compiled.values())
            if all(map(_serves, found.key, key, bounded))
        ]
        for found in sorted(possible, key=partial(_distance, key)):
            with suppress(PlanDoesNotFit):
                found.variant.pack(args)
                return found
        return None

    def compile_variant(
        self, args: Sequence[Any], changing: frozenset[int] = frozenset(), key: Key = ()
    ) -> _Compiled:
        """Run the pipeline for these weights; where it fails, compile the graph as it was.

        `key` is that of the plans that were asked for, by which a failure is found again.
        """
        start = time.perf_counter()
        recorder = self._recorder()
        try:
            state, plan, variant = self._run(args, changing, recorder)
        except Exception as error:
            self._agree(args, {"outcome": f"pass {recorder.running!r} failed with {error!r}"})
            strict = self._config.on_unsupported == "error"
            if strict or isinstance(error, (RankError, *DYNAMO_REQUESTS)):
                raise
            text = (
                f"{self._name} runs unquantised: pass {recorder.running!r} failed with "
                f"{type(error).__name__}: {error}"
            )
            log.warning(text, exc_info=log.isEnabledFor(logging.DEBUG))
            return self._unquantized(args, recorder, text, key)
        state.args = ()  # the example weights must not outlive their model
        self._analysed = self._analysed or state
        key = _key(tuple(s.plan or str(s.reason) for s in state.sites if not s.settled))
        seconds = time.perf_counter() - start
        warnings = warnings_of(state)
        for text in warnings:
            log.warning(text)
        return self._keep(key, variant, recorder, plan, warnings, seconds)

    def _run(
        self, args: Sequence[Any], changing: frozenset[int], recorder: Recorder
    ) -> tuple[GraphState, Plan, Variant]:
        """All passes; again where another thread has written to a weight between two of them."""
        for attempt in range(ATTEMPTS):
            recorder.records.clear()
            try:
                state = analyse(
                    self._module, args, self._config, recorder, name=self._name, changing=changing
                )
                plan = plan_of(state)
                self._agree(args, shared_facts(state))
                return state, plan, compile_state(state, args, recorder)
            except PlanDoesNotFit:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _recorder(self) -> Recorder:
        return Recorder(keep_graphs=self._config.debug_dir is not None or is_traced())

    def _agree(self, args: Sequence[Any], facts: Mapping[str, str]) -> None:
        """With the other ranks of a sharded model, once: later variants are each rank's own."""
        if not self._agreed:
            self._agreed = True
            agree(self._name, facts, rank_groups(args))

    def _unquantized(
        self, args: Sequence[Any], recorder: Recorder, text: str, key: Key
    ) -> _Compiled:
        module, _ = copy_module(self._module)
        inner = compile_inner(module, args, self._config)
        variant = Variant(inner, tuple(range(len(args))), lambda args: ())
        return self._keep(key, variant, recorder, Plan((), self._config.as_dict()), (text,), 0.0)

    def _keep(
        self,
        key: Key,
        variant: Variant,
        recorder: Recorder,
        plan: Plan,
        warnings: tuple[str, ...],
        seconds: float,
    ) -> _Compiled:
        number = len(self._compiled)
        name = f"{self._name}_variant_{number}" if number else self._name
        passes = tuple(recorder.records)
        report = CompileReport(name, plan, passes, warnings, _VERSIONS, seconds)
        log.info("%s: %s", name, plan.totals)
        log.debug("%s", report)
        record(report)
        trace_report(report)
        if self._config.debug_dir is not None:
            dump_report(report, self._config.debug_dir)
        self._compiled[key] = found = _Compiled(key, variant, report)
        return found

    def _say_once(self, found: _Compiled, text: str) -> None:
        """In the log and in the report of what runs from now on."""
        if text not in self._said:
            self._said.add(text)
            log.warning(text)
            found.report = with_warning(found.report, text)


def _serves(plan: PlanKey, asked: PlanKey, bounded: bool) -> bool:
    """Whether a site whose weight asks for one plan may be quantised by another one."""
    return plan is None or plan == asked or (asked is not None and not bounded)


def _distance(asked: Key, found: _Compiled) -> tuple[int, int]:
    """Sites that would be coarser than they ask for; then how coarse or large all are."""
    pairs = [(p, a) for p, a in zip(found.key, asked, strict=True) if a is not None]
    coarser = [p is not None and (p[0] < a[0] or p[1] > a[1]) for p, a in pairs]
    return sum(coarser), sum(1 << 20 if p is None else p[1] for p, _ in pairs)


def _key(decisions: Sequence[Decision]) -> Key:
    """Equal where the rewritten graphs are equal."""
    return tuple(
        None if isinstance(d, str) else (d.bits, d.group_size, d.scale_method, d.scale_dtype)
        for d in decisions
    )
