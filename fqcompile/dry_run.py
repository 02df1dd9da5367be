"""Shows each graph that Dynamo captures of a function to a visitor, and compiles nothing."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fqcompile.passes.base import copy_module
from fqcompile.torch_compat import compiled_call, dynamo_config, optimize, set_compiled_call

Visitor = Callable[[fx.GraphModule, Sequence[Any]], None]

_visitor: ContextVar[Visitor | None] = ContextVar("fqcompile_dry_run", default=None)


def _visiting_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Visits when it runs, not when compiled: Dynamo may reuse the graph of an earlier call."""
    module, _ = copy_module(gm)

    def run(*args: Any) -> Any:
        visit = _visitor.get()
        if visit is not None:
            visit(module, args)
        return module(*args)

    return run


@cache
def _captured() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Captures a function's graphs for a visit, counted apart from its real compilations.

    torch before 2.13 counts both together: there many dry runs with unlike inputs leave fewer
    recompilations to the model itself.
    """
    known = inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    context: Callable[[Callable[..., Any]], Callable[..., Any]]
    context = optimize(_visiting_backend, **apart)
    return context


@contextmanager
def _not_in_place(model: object) -> Iterator[None]:
    """Without what `compile()` has put before a model or its parts: it would really compile."""
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

    `grad`: in grad mode, where a weight that requires grad stays as it is.
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
