"""A contraction with a matrix per expert, by the names of its indices.

bmm(x, w[ids])       "pmk,pkn->pmn"      batch p: one id each      rows m
"ti,taoi->tao"       w[ids], ids [t, a]  batch t, a                x repeated for each a
"egcm,emh->egch"     the stack itself    batch e: each expert      rows g, c

x: permute to [batch, rows, K], flatten -> [rows of the op, K]; the result the same way back
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Step = tuple[str, tuple[Any, ...]]
STACK = "expert"  # the first index of a stack from which ids pick


@dataclass(frozen=True, kw_only=True)
class ExpertEinsum:
    """Indices by role; `x` and `out` in the order of the tensors' dimensions.

    `weight_steps` are tensor methods that make [E, N, K] of the stack. `x_singles` are dimensions
    of x, of size one, that broadcasting made and that go first.
    """

    x: tuple[str, ...]
    out: tuple[str, ...]
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    contracted: tuple[str, ...]
    free: tuple[str, ...]
    weight_steps: tuple[Step, ...]
    x_singles: tuple[int, ...] = ()


def expert_einsum(
    x: Sequence[str],
    stack: Sequence[str],
    out: Sequence[str],
    batch: Sequence[str],
    sizes: Mapping[str, int],
) -> ExpertEinsum | None:
    """The roles of all indices, or None where it is no product of rows and experts' matrices.

    Args:
        stack: indices of the constant stack; its first is STACK where ids pick from it, and
            `batch` are then the indices of ids, else those of the stack that x and out share.
        sizes: of the stack's own indices.
    """
    own = [i for i in stack if i != STACK and i not in batch]
    contracted = [i for i in own if i in x and i not in out]
    free = [i for i in own if i in out and i not in x]
    rows = [i for i in x if i in out and i not in batch]
    leading = [STACK] if STACK in stack else list(batch)
    complete = (
        bool(batch and contracted and free)
        and len(contracted) + len(free) == len(own)
        and sorted(out) == sorted([*batch, *rows, *free])
        and set(x) <= {*batch, *rows, *contracted}
        and all(len(set(names)) == len(names) for names in (x, stack, out))
    )
    if not complete or (STACK not in stack and not set(batch) <= set(x)):
        return None
    n, k = (math.prod(sizes[i] for i in names) for names in (free, contracted))
    order = [list(stack).index(i) for i in (*leading, *free, *contracted)]
    steps: list[Step] = [] if order == sorted(order) else [("permute", tuple(order))]
    if len(order) > 3:
        steps.append(("reshape", (math.prod(sizes[i] for i in leading), n, k)))
    return ExpertEinsum(
        x=tuple(x),
        out=tuple(out),
        batch=tuple(batch),
        rows=tuple(rows),
        contracted=tuple(contracted),
        free=tuple(free),
        weight_steps=tuple(steps),
    )
