"""A dry run: what the backend would do to a model, without compiling it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from fqcompile.config import FineQuantConfig
from fqcompile.passes.base import copy_module
from fqcompile.passes.pipeline import Recorder, analyse
from fqcompile.passes.summary import plan_of
from fqcompile.report import Plan, Site


@dataclass
class _Collector:
    config: FineQuantConfig
    sites: dict[tuple[str, int], Site] = field(default_factory=dict)

    def add(self, module: fx.GraphModule, args: Sequence[Any]) -> None:
        state = analyse(module, args, self.config, Recorder())
        for site in plan_of(state).sites:
            # A weight met in several graphs, as after a graph break, is one site.
            self.sites.setdefault((site.name, hash(site.shape)), site)


_collector: ContextVar[_Collector | None] = ContextVar("fqcompile_explain", default=None)


def _analysing_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Analyses when it runs, not when compiled: Dynamo may reuse the graph of an earlier call."""
    module, _ = copy_module(gm)

    def run(*args: Any) -> Any:
        collector = _collector.get()
        if collector is not None:
            collector.add(module, args)
        return module(*args)

    return run


@cache
def _dry_run() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Captures a function's graphs for analysis, counted apart from its real compilations.

    torch before 2.13 counts both together: there many dry runs with unlike inputs leave fewer
    recompilations to the model itself.
    """
    known = inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    context: Callable[[Callable[..., Any]], Callable[..., Any]]
    context = torch._dynamo.optimize(_analysing_backend, **apart)
    return context


def explain(
    model: Callable[..., Any],
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: object,
) -> Plan:
    """What `torch.compile(model, backend="finequant", options=options)` would do, as a plan.

    The model runs once, eagerly, on the example inputs; its weights are not changed.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
        UnquantizableWeight: a site must be kept and `on_unsupported="error"`.
    """
    collector = _Collector(FineQuantConfig.from_options(options))
    token = _collector.set(collector)
    try:
        limits = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16}
        with torch._dynamo.config.patch(limits):
            _dry_run()(model)(*example_inputs, **(example_kwargs or {}))
    finally:
        _collector.reset(token)
    return Plan(tuple(collector.sites.values()), collector.config.as_dict())
