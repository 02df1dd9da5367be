"""Why something could not be measured, in one line."""

import torch

from fqcompile.kernels.tuning.measure import check_device
from fqcompile.kernels.tuning.search import DeviceLost, WrongResult

_LONGEST = 200


def failure(error: Exception) -> str:
    """One line on what went wrong.

    Raises:
        DeviceLost: it took the connection to the GPU with it.
    """
    if isinstance(error, DeviceLost):
        raise error
    if torch.cuda.is_available():
        check_device(error)
    lines = str(error).strip().splitlines() or [""]
    kind = "wrong result" if isinstance(error, WrongResult) else type(error).__name__
    return f"{kind}: {lines[0]}"[:_LONGEST]
