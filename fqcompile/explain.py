"""Dry runs: report what the backend would do to a model and list its matmuls, without compiling."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fqcompile.config import FineQuantConfig
from fqcompile.distributed.shards import local_part
from fqcompile.kernels.spec import GemmSpec
from fqcompile.modules.weights import module_weights
from fqcompile.passes.choices import way_out
from fqcompile.passes.pipeline import Recorder, analyze
from fqcompile.passes.select import gemm_spec
from fqcompile.passes.sharded import localize
from fqcompile.passes.state import copy_module, placeholders
from fqcompile.passes.summary import RowKey, rows_of, with_other_readers
from fqcompile.report import Plan, Site
from fqcompile.torch_compat import (
    Convolution,
    compiled_call,
    dynamo_config,
    optimize,
    plain_module,
    set_compiled_call,
)

Visitor = Callable[[fx.GraphModule, Sequence[Any]], None]

_visitor: ContextVar[Visitor | None] = ContextVar("fqcompile_dry_run", default=None)
_PART = re.compile(r"\[\d+\]$")  # match numbers the parts of one parameter
_NO_GRAPH = (
    "no captured graph reads it: these inputs do not reach it, or a loop over data broke the graph"
    ", or torch.compile skips the function that calls it (TORCH_LOGS=graph_breaks says why); "
    "fqcompile.quantize_(model) packs linears and experts without a graph"
)
_CONVOLUTION = (
    "no captured graph reads it, and it is a convolution's, of which few forms are quantized"
)
_RECURRENT = (
    "no captured graph reads it: torch.compile does not trace {kind}, nor the function that calls "
    "it; call fqcompile.quantize_(model) first"
)


def explain(
    model: Callable[..., Any],
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    grad: bool = False,
    **options: object,
) -> Plan:
    """Return the plan that `torch.compile(model, backend="finequant", options=options)` would use.

    The model runs once, eagerly, on the example inputs. fqcompile does not change its weights, but
    writes by the model's own code persist, such as RWKV's in-place rescaling in its first call. The
    plan describes this run; a second `explain` describes later runs.

    Args:
        model: a module or a function, as for `torch.compile`.
        example_inputs, example_kwargs: what it is called with.
        grad: run in grad mode, as in training, where weights that require grad are skipped. By
            default the plan describes calls under `torch.no_grad()`.
        options: the fields of `FineQuantConfig`.

    Returns:
        A plan with one row per weight that a matrix product reads: bits, group size and error, or
        why it would stay dense.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
        UnquantizableWeight: a weight cannot be quantized and `on_unsupported="error"`.
    """
    config = FineQuantConfig.from_options(options)
    measuring_nothing = replace(config, autotune="off")
    rows: dict[RowKey, Site] = {}
    alive: list[Any] = []  # what a row is of is told by `id`, so no weight may die meanwhile

    def collect(module: fx.GraphModule, args: Sequence[Any]) -> None:
        local = localize(module, args)
        state = analyze(local.module, local.arguments(args), measuring_nothing, Recorder())
        inputs = zip(placeholders(state.graph), state.args, strict=False)  # packed ones follow
        alive.extend(value for node, value in inputs if node in state.known)
        for key, row in rows_of(state).items():
            # A weight that several graphs read, as after a graph break, is one site.
            rows.setdefault(key, row.site)

    dry_run(model, example_inputs, example_kwargs or {}, collect, grad=grad)
    seen = {weight for weights, _ in rows for weight in weights}
    unseen = _unseen(model, seen, config)
    return Plan((*_numbered(with_other_readers(rows)), *unseen), config.as_dict())


def _numbered(rows: Mapping[RowKey, Site]) -> Iterator[Site]:
    """The sites, with the parts of each weight numbered across all graphs that read it."""
    recipes: dict[tuple[int, ...], dict[str, None]] = {}
    for weights, read in rows:
        if read is not None:
            recipes.setdefault(weights, {})[read.recipe] = None
    for (weights, read), site in rows.items():
        keys = list(recipes.get(weights, ()))
        if read is not None and len(keys) > 1:
            name = _PART.sub("", site.name)
            site = site.but(name=f"{name}[{keys.index(read.recipe)}]")
        yield site


def _unseen(model: object, seen: Collection[int], config: FineQuantConfig) -> Iterator[Site]:
    """The matrices of a module that no captured graph reads, as skipped sites."""
    if not isinstance(model, nn.Module):
        return
    root = plain_module(model)
    modules = [*root.modules()]
    kinds = {id(found.parameter): found.kind for found in module_weights(root, config)}
    filters = {id(p) for m in modules if isinstance(m, Convolution) for p in m.parameters()}
    experts_way_out = way_out({type(module).__module__ for module in modules})
    recurrent = next((type(m).__name__ for m in modules if isinstance(m, nn.RNNBase)), None)
    no_graph = _RECURRENT.format(kind=f"nn.{recurrent}") if recurrent else _NO_GRAPH
    for name, weight in root.named_parameters():
        if weight.dim() < 2 or weight.numel() < config.min_elements:
            continue
        if id(weight) in seen or id(local_part(weight)) in seen:
            continue
        kind = "linear" if weight.dim() == 2 else kinds.get(id(weight), "other")
        reason = no_graph + (experts_way_out if kind == "experts" else "")
        yield Site(
            name=name,
            kind=kind,
            shape=tuple(weight.shape),
            status="kept",
            reason=_CONVOLUTION if id(weight) in filters else reason,
            bytes_before=weight.nbytes,
            bytes_after=weight.nbytes,
        )


def gemm_specs(
    model: Callable[..., Any], *example_inputs: Any, grad: bool = False, **options: object
) -> list[GemmSpec]:
    """The distinct matmuls that compiling `model` with these options would quantize.

    The model runs once, eagerly, on the example inputs; its weights are not changed.
    `grad`: run in grad mode, where fewer operations are fused.
    """
    config = FineQuantConfig.from_options({**options, "autotune": "off"})
    specs: dict[GemmSpec, None] = {}

    def collect(module: fx.GraphModule, args: Sequence[Any]) -> None:
        state = analyze(module, args, config, Recorder())
        specs.update(dict.fromkeys(gemm_spec(state, op) for op in state.packed))

    dry_run(model, example_inputs, {}, collect, grad=grad)
    return list(specs)


def _visiting_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Calls `visit` when the graph runs, not when it is compiled: Dynamo may reuse a graph."""
    module, _ = copy_module(gm)

    def run(*args: Any) -> Any:
        visit = _visitor.get()
        if visit is not None:
            visit(module, args)
        return module(*args)

    return run


@cache
def _captured() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Captures a function's graphs for a dry run, with a recompilation limit of its own.

    torch before 2.13 has one limit for both, so many dry runs with different inputs leave the
    model itself fewer recompilations.
    """
    known = inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    context: Callable[[Callable[..., Any]], Callable[..., Any]]
    context = optimize(_visiting_backend, **apart)
    return context


@contextmanager
def _not_in_place(model: object) -> Iterator[None]:
    """Remove the wrappers that `compile()` put on a model and its parts: they would compile."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    compiled = [(m, compiled_call(m)) for m in modules if compiled_call(m) is not None]
    try:
        for module, _ in compiled:
            set_compiled_call(module, None)
        yield
    finally:
        for module, call in compiled:
            set_compiled_call(module, call)


def dry_run(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    visit: Visitor,
    *,
    grad: bool = False,
) -> None:
    """Run `model` once, eagerly, with `visit(graph, its inputs)` before each of its graphs.

    `grad`: run in grad mode, where weights that require grad are skipped.
    """
    token = _visitor.set(visit)
    try:
        limits = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16}
        with (
            torch.set_grad_enabled(grad),
            dynamo_config.patch(limits),
            _not_in_place(model),
        ):
            _captured()(model)(*args, **kwargs)
    finally:
        _visitor.reset(token)
