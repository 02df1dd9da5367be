"""Whether processes that run one model in several ways have computed the same."""

from collections.abc import Sequence

import torch

from bench.core.results import Row
from bench.models.rows import allowed_error
from fqcompile.kernels.tuning.search import WrongResult

# Random weights quantised to 4 bits by any rule are a tenth of their size off, and so is a model of
# few layers some times that.
_LOOSELY = 0.6


def checked(row: Row, before: Sequence[Row], layers: int) -> Row:
    """The row, with its error against the first of those `before` it.

    Each has "way", "ours" and "logits".

    Raises:
        WrongResult: they are not those of the plain model to 4 bits, or of our other ways exactly
            to rounding.
    """
    logits = torch.tensor(row["logits"], dtype=torch.float64)
    for other in before:
        if "logits" not in other:
            continue
        expected = torch.tensor(other["logits"], dtype=torch.float64)
        error = float((logits - expected).norm() / expected.norm())
        alike = row["ours"] and other["ours"]
        allowed = allowed_error(torch.bfloat16, layers) if alike else _LOOSELY
        if not error <= allowed:
            raise WrongResult(f"{error:.2g} from {other['way']}, allowed {allowed:.2g}")
        row["error"] = row.get("error", error)
    return row
