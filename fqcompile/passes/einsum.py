"""Reads a two-operand einsum with a constant operand as a linear layer.

"bshk,hkd->bsd"   x: flatten (h, k) -> [b, s, K]     w: permute, flatten -> [d, K]
"bsd,dhk->bshk"   w: permute, flatten -> [h*k, d]    out: unflatten -> [b, s, h, k]
"""

import math
from collections.abc import Sequence
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
    parsed = _parse(equation, weight_position, len(weight_shape), len(x_shape))
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


def einsum_indices(equation: str, ndims: Sequence[int]) -> list[list[str]] | None:
    """Index names of two operands and of the result; None where the equation has another form.

    An ellipsis becomes as many unnamed indices as its operand has more dimensions than names; of
    several, the last ones are shared, as einsum does it.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if (
        not arrow
        or len(operands) != len(ndims)
        or any(t.count("...") > 1 for t in (*operands, output))
    ):
        return None
    hidden = [
        max(0, n - len(t.replace("...", ""))) if "..." in t else 0
        for t, n in zip(operands, ndims, strict=True)
    ]
    unnamed = [f"...{i}" for i in range(max(hidden))]
    names = [
        _expand(term, unnamed[len(unnamed) - count :])
        for term, count in zip((*operands, output), (*hidden, len(unnamed)), strict=True)
    ]
    if any(len(set(term)) != len(term) for term in names):
        return None
    fits = all(len(term) == n for term, n in zip(names, ndims, strict=False))
    return names if fits else None


def _parse(
    equation: str, weight_position: int, weight_ndim: int, x_ndim: int
) -> tuple[list[str], list[str], list[str]] | None:
    """Index names of x, weight and result; none of the weight's may be unnamed."""
    ndims = [x_ndim, x_ndim]
    ndims[weight_position] = weight_ndim
    parsed = einsum_indices(equation, ndims)
    if parsed is None or any(name.startswith(".") for name in parsed[weight_position]):
        return None
    return parsed[1 - weight_position], parsed[weight_position], parsed[2]


def _expand(term: str, hidden: list[str]) -> list[str]:
    head, dots, tail = term.partition("...")
    return [*head, *(hidden if dots else []), *tail]


def _permute(have: list[str], want: list[str]) -> list[Step]:
    return [] if have == want else [("permute", tuple(have.index(i) for i in want))]


def _flatten_last(count: int) -> list[Step]:
    return [] if count == 1 else [("flatten", (-count, -1))]


def _unflatten_last(sizes: list[int]) -> list[Step]:
    return [] if len(sizes) == 1 else [("unflatten", (-1, tuple(sizes)))]
