"""The first call of a compiled model, made before anyone waits for it."""

from collections.abc import Callable
from typing import Any

import torch

from fqcompile.report import CompileReport, recorded

_MOST_CALLS = 8


def warm_up(
    model: Callable[..., Any], *args: Any, grad: bool = False, **kwargs: Any
) -> list[CompileReport]:
    """Call `model` until a call compiles nothing more; returns the reports of what was compiled.

    Weights are quantised and packed, kernels searched (`autotune="fast"` or "max") and built for
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
