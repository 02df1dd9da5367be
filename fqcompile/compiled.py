"""What a user says of what FineQuant compiles, beside `torch.compile` itself.

finequant   the decorator: a function or a forward method, compiled
warm_up     the first call of a compiled model, made before anyone waits for it
refresh     what was made of a model's weights is stale; the next call makes it again
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from fqcompile.backend import NAME
from fqcompile.config import FineQuantConfig
from fqcompile.distributed.shards import local_part
from fqcompile.errors import FineQuantError
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
        options: those of `FineQuantConfig`; checked here, when the function is defined.

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
    """Call `model` until a call compiles nothing more; returns the reports of what was compiled.

    Weights are quantized and packed, kernels searched (`autotune="fast"` or "max") and built for
    these inputs, so that the next such call only runs. Call it once for
    each number of rows to be served, since a kernel is built for the rows it is first called with.
    The model really runs: caches that it writes to are written to.

    Args:
        grad: call in grad mode, where requests will. Else under `torch.no_grad()`: a graph is
            compiled for one mode, and in grad mode weights that require grad stay dense.
    """
    before = recorded()
    for _ in range(_MOST_CALLS):
        known = recorded()
        with torch.set_grad_enabled(grad):
            model(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if not _since(known):
            break
    return _since(before)


def _since(before: list[CompileReport]) -> list[CompileReport]:
    """The reports that are not among those; only the newest are kept, so their number tells not."""
    known = set(map(id, before))
    return [report for report in recorded() if id(report) not in known]


def refresh(model: nn.Module) -> None:
    """Say that weights of a compiled model were changed in a way that PyTorch does not see.

    That is a write through `weight.data`, as peft's `merge_adapter` and `unmerge_adapter` make, one
    by other code than PyTorch's, and any to a tensor made in inference mode. The next call of each
    graph that reads them quantizes them as they are then, also with `weight_updates="ignore"`, and
    also those that were left as they are since they changed in every call.

    Raises:
        FineQuantError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise FineQuantError(
            f"refresh takes the nn.Module whose weights were written to, not {type(model).__name__}"
        )
    weights = list(_tensors(model))
    STORE.forget(weights)
    start_again(weights)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and attributes of it and of all modules in it."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (local_part(t) for t in held.values() if isinstance(t, Tensor))
