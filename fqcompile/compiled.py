"""User functions for compiled models, in addition to `torch.compile` itself.

finequant   decorator that compiles a function or a forward method
warm_up     compile and quantize ahead of the first request
refresh     mark a model's quantized weights as stale; the next call quantizes them again
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from fqcompile.backend import NAME
from fqcompile.config import FineQuantConfig
from fqcompile.distributed.shards import local_part
from fqcompile.kernels.registry import every_step_built
from fqcompile.modules.given import check_model
from fqcompile.report import CompileReport, recorded
from fqcompile.weights.dispatch import start_again
from fqcompile.weights.store import STORE

F = TypeVar("F", bound=Callable[..., Any])
_MOST_CALLS = 8  # of warming up


@overload
def finequant(function: F, /) -> F: ...
@overload
def finequant(
    *, fullgraph: bool = False, dynamic: bool | None = None, **options: object
) -> Callable[[F], F]: ...
def finequant(
    function: F | None = None,
    /,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: object,
) -> F | Callable[[F], F]:
    """Compile a function or a forward method with `torch.compile(backend="finequant")`.

        @fqcompile.finequant
        def forward(self, x): ...

        @fqcompile.finequant(bits=8, fullgraph=True)
        def forward(self, x): ...

    Args:
        fullgraph, dynamic: as for `torch.compile`.
        options: the fields of `FineQuantConfig`; checked here, when the function is defined.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
    """
    FineQuantConfig.from_options(options)

    def compile_function(function: F) -> F:
        compiled: Any = torch.compile(
            function,
            backend=NAME,
            fullgraph=fullgraph,
            dynamic=dynamic,
            options=dict(options) or None,  # type: ignore[arg-type]
        )
        return cast(F, compiled)

    return compile_function if function is None else compile_function(function)


def warm_up(
    model: Callable[..., Any], *args: Any, grad: bool = False, **kwargs: Any
) -> list[CompileReport]:
    """Call `model` until a call compiles nothing more; return the reports of what was compiled.

    Weights are quantized and packed, and kernels are tuned (`autotune="fast"` or "max") and built
    for these inputs, so that the next such call only runs. Where the number of rows is dynamic, the
    kernels of all numbers are built; else call it once for each batch size to be served. The model
    really runs, so caches that it updates (such as a KV cache) are updated.

    Args:
        model: what `torch.compile` returned, or a module that was compiled in place.
        args, kwargs: what it is called with, as the first request will.
        grad: call in grad mode, if requests will run in it; by default under `torch.no_grad()`. A
            graph is compiled for one mode, and in grad mode weights that require grad stay dense.

    Returns:
        The report of each graph that was compiled; none if all were compiled before.
    """
    before = recorded()
    for _ in range(_MOST_CALLS):
        known = recorded()
        with torch.set_grad_enabled(grad), every_step_built():
            model(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if not _since(known):
            break
    return _since(before)


def _since(before: list[CompileReport]) -> list[CompileReport]:
    """Reports not seen before, by identity: their number tells nothing, as old ones are dropped."""
    known = set(map(id, before))
    return [report for report in recorded() if id(report) not in known]


def refresh(model: nn.Module) -> None:
    """Quantize the weights of a compiled model again in its next call.

    Needed after writes that PyTorch does not track: through `weight.data` (as peft's
    `merge_adapter` and `unmerge_adapter` do), by code outside PyTorch, or to a tensor created in
    inference mode. The next call of each graph that reads the weights quantizes their current
    values, even with `weight_updates="ignore"` and even if a weight was left dense because it
    changed in every call.

    Raises:
        OptionError: `model` is not an nn.Module.
    """
    check_model(model, "refresh")
    weights = list(_tensors(model))
    STORE.forget(weights)
    start_again(weights)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors of a module and its submodules: parameters, buffers and plain attributes."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (local_part(t) for t in held.values() if isinstance(t, Tensor))
