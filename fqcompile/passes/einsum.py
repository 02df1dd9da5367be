"""Reads a two-operand einsum with a constant operand as a linear layer.

"bshk,hkd->bsd"   x: flatten (h, k) -> [b, s, K]     w: permute, flatten -> [d, K]
"bsd,dhk->bshk"   w: permute, flatten -> [h*k, d]    out: unflatten -> [b, s, h, k]
"""

import math
from dataclasses import dataclass
from typing import Any

Step = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class LinearEinsum:
    """Tensor methods that make x [..., K], the weight [N, K], and of [..., N] the result."""

    x_steps: tuple[Step, ...]
    weight_steps: tuple[Step, ...]
    out_steps: tuple[Step, ...]


def linear_einsum(
    equation: str, weight_position: int, weight_shape: tuple[int, ...], x_shape: tuple[int, ...]
) -> LinearEinsum | None:
    """The steps, or None where the contraction is not a linear layer.

    It is none with a shared batch index, a diagonal, an index summed over on one side, or a
    contracted index of size 1 on one side, which einsum broadcasts.
    """
    parsed = _parse(equation, weight_position, len(x_shape))
    if parsed is None:
        return None
    x, weight, out = parsed
    contracted = [i for i in weight if i in x and i not in out]
    free = [i for i in weight if i in out and i not in x]
    batch = [i for i in x if i in out]
    size = dict(zip(weight, weight_shape, strict=True))
    x_size = dict(zip(x, x_shape, strict=True))
    complete = (
        len(contracted) + len(free) == len(weight)
        and len(contracted) + len(batch) == len(x)
        and sorted(out) == sorted(batch + free)
    )
    broadcast = any((size[i] == 1) != (x_size[i] == 1) for i in contracted)
    if not complete or not contracted or not free or broadcast:
        return None
    n, k = math.prod(size[i] for i in free), math.prod(size[i] for i in contracted)
    result = batch + free
    return LinearEinsum(
        (*_permute(x, batch + contracted), *_flatten_last(len(contracted))),
        (*_permute(weight, free + contracted), ("reshape", (n, k))),
        (*_unflatten_last([size[i] for i in free]), *_permute(result, out)),
    )


def _parse(
    equation: str, weight_position: int, x_ndim: int
) -> tuple[list[str], list[str], list[str]] | None:
    """Index names of x, weight and result; an ellipsis on x becomes as many unnamed indices."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow or len(operands) != 2:
        return None
    weight, x = operands[weight_position], operands[1 - weight_position]
    if "." in weight or x.count("...") > 1 or output.count("...") > 1:
        return None
    hidden = [f"...{i}" for i in range(x_ndim - len(x.replace("...", "")))] if "..." in x else []
    names = [_expand(term, hidden) for term in (x, weight, output)]
    if any(len(set(term)) != len(term) for term in names) or len(names[0]) != x_ndim:
        return None
    return names[0], names[1], names[2]


def _expand(term: str, hidden: list[str]) -> list[str]:
    head, dots, tail = term.partition("...")
    return [*head, *(hidden if dots else []), *tail]


def _permute(have: list[str], want: list[str]) -> list[Step]:
    return [] if have == want else [("permute", tuple(have.index(i) for i in want))]


def _flatten_last(count: int) -> list[Step]:
    return [] if count == 1 else [("flatten", (-count, -1))]


def _unflatten_last(sizes: list[int]) -> list[Step]:
    return [] if len(sizes) == 1 else [("unflatten", (-1, tuple(sizes)))]
