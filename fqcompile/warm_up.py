"""The first call of a compiled model, made before anyone waits for it."""

from collections.abc import Callable
from typing import Any

import torch

from fqcompile.report import CompileReport, reports

_MOST_CALLS = 8


def warm_up(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[CompileReport]:
    """Call `model` until a call compiles nothing more; returns the reports of what was compiled.

    Weights are quantised and packed, kernels searched (`autotune="fast"` or "max") and built for
    these inputs, so that the next such call only runs. Call it as requests will: in their grad
    mode, and once for each number of rows to be served, since a kernel is built for the rows it is
    first called with. The model really runs: caches that it writes to are written to.
    """
    before = len(reports())
    for _ in range(_MOST_CALLS):
        known = len(reports())
        model(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if len(reports()) == known:
            break
    return reports()[before:]
