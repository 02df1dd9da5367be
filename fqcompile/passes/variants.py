"""GraphCompiler: one captured graph, compiled once for each set of plans that its weights ask for.

Dynamo hands the same graph to every instance of a class. Instances whose weights lead to the same
plans share a variant; others get their own. A failure inside the passes never loses the model: the
graph is compiled as it was, and a warning says which pass failed and why.
"""

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from torch import fx
from torch._dynamo import exc
from torch._guards import TracingContext, tracing

from fqcompile.config import FineQuantConfig
from fqcompile.distributed.agreement import agree
from fqcompile.distributed.shards import rank_groups
from fqcompile.errors import RankError
from fqcompile.passes.agreement import shared_facts
from fqcompile.passes.base import GraphState, copy_module
from fqcompile.passes.choose import Decision, decide
from fqcompile.passes.localize import localize, refuse_fsdp
from fqcompile.passes.lower import compile_inner
from fqcompile.passes.op_nodes import argument
from fqcompile.passes.pipeline import Recorder, analyse, compile_state
from fqcompile.passes.summary import plan_of
from fqcompile.report import CompileReport, Plan, dump_report, is_traced, record, trace_report
from fqcompile.weights.dispatch import Inner, Variant, WeightDispatch

log = logging.getLogger("fqcompile")
_graph_numbers = itertools.count()
# How Inductor asks Dynamo to trace again or to give up on a frame: not failures.
_DYNAMO_REQUESTS = (exc.RestartAnalysis, exc.SkipFrame, exc.Unsupported)
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
    graph = GraphCompiler(module, config, name)
    first = graph.compile_variant(args)
    weight_inputs = graph.weight_inputs()
    if not weight_inputs:
        return first.inner
    detect = config.weight_updates == "detect"
    dispatch = WeightDispatch(weight_inputs, graph.variant_for, detect)
    dispatch.bind(args)
    return dispatch


class GraphCompiler:
    """See the module's docstring. `variant_for` is what runs when unseen weights come in."""

    def __init__(self, module: fx.GraphModule, config: FineQuantConfig, name: str) -> None:
        self._module, _ = copy_module(module)
        self._config = config
        self._name = name
        self._context = TracingContext.try_get()
        self._variants: dict[tuple[object, ...], Variant] = {}
        self._analysed: GraphState | None = None
        self._agreed = False

    def weight_inputs(self) -> tuple[int, ...]:
        """Arguments on which the choice of a variant depends."""
        if self._analysed is None:
            return ()
        constants = self._analysed.constants
        open_sites = [site for site in self._analysed.sites if not site.settled]
        return tuple(sorted({constants[s] for site in open_sites for s in site.sources}))

    def variant_for(self, args: Sequence[Any]) -> Variant:
        """The variant whose plans fit the weights in `args`, compiled if there is none yet."""
        state = self._analysed
        assert state is not None
        variant = self._variants.get(_key(decide(state, args)))
        if variant is None:
            with tracing(self._context):
                return self.compile_variant(args)
        return variant

    def compile_variant(self, args: Sequence[Any]) -> Variant:
        """Run the pipeline for these weights; where it fails, compile the graph as it was."""
        start = time.perf_counter()
        recorder = Recorder(keep_graphs=self._config.debug_dir is not None or is_traced())
        try:
            state = analyse(self._module, args, self._config, recorder, name=self._name)
            plan = plan_of(state)
            self._agree(args, shared_facts(state))
            variant = compile_state(state, args, recorder)
        except Exception as error:
            self._agree(args, {"outcome": f"pass {recorder.running!r} failed with {error!r}"})
            strict = self._config.on_unsupported == "error"
            if strict or isinstance(error, (RankError, *_DYNAMO_REQUESTS)):
                raise
            return self._unquantized(args, recorder, error)
        state.args = ()  # the example weights must not outlive their model
        self._analysed = self._analysed or state
        self._variants[
            _key(tuple(s.plan or str(s.reason) for s in state.sites if not s.settled))
        ] = variant
        self._report(recorder, plan, _warnings(state), time.perf_counter() - start)
        return variant

    def _agree(self, args: Sequence[Any], facts: Mapping[str, str]) -> None:
        """With the other ranks of a sharded model, once: later variants are each rank's own."""
        if not self._agreed:
            self._agreed = True
            agree(self._name, facts, rank_groups(args))

    def _unquantized(self, args: Sequence[Any], recorder: Recorder, error: Exception) -> Variant:
        text = (
            f"{self._name} runs unquantised: pass {recorder.running!r} failed with "
            f"{type(error).__name__}: {error}"
        )
        log.warning(text, exc_info=log.isEnabledFor(logging.DEBUG))
        module, _ = copy_module(self._module)
        inner = compile_inner(module, args, self._config)
        self._report(recorder, Plan((), self._config.as_dict()), (text,), 0.0)
        return Variant(inner, tuple(range(len(args))), lambda args: ())

    def _report(
        self, recorder: Recorder, plan: Plan, warnings: tuple[str, ...], seconds: float
    ) -> None:
        number = len(self._variants)
        name = self._name if number < 2 else f"{self._name}_variant_{number - 1}"
        passes = tuple(recorder.records)
        report = CompileReport(name, plan, passes, warnings, _VERSIONS, seconds)
        log.info("%s: %s", name, plan.totals)
        log.debug("%s", report)
        record(report)
        trace_report(report)
        if self._config.debug_dir is not None:
            dump_report(report, self._config.debug_dir)


def _key(decisions: Sequence[Decision]) -> tuple[object, ...]:
    """Equal where the rewritten graphs are equal."""
    return tuple(
        None if isinstance(d, str) else (d.bits, d.group_size, d.scale_method, d.scale_dtype)
        for d in decisions
    )


def _warnings(state: GraphState) -> tuple[str, ...]:
    """What a user would want to know without looking for it; also logged."""
    frozen = [s.name for s in state.sites if s.reason and "requires grad" in s.reason]
    texts = list(state.warnings)
    if frozen:
        texts.append(
            f"{len(frozen)} of {len(state.sites)} sites are kept: their weights require grad "
            f"({frozen[0]}, ...): call the model under torch.no_grad(), or freeze them with "
            "requires_grad_(False)"
        )
    kernels = [str(argument(op, "kernel")) for op in state.packed]
    if state.config.autotune != "off" and kernels and not any(":" in k for k in kernels):
        texts.append(
            f"autotune={state.config.autotune!r}: the kernels of this graph "
            f"({', '.join(sorted(set(kernels)))}) have nothing to configure"
        )
    for text in texts:
        log.warning(text)
    return tuple(texts)
