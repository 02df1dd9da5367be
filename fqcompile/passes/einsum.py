"""Equations of einsum: the names of indices, the result that is implied, and products of pairs.

"bk,nk"                    ->  "bk,nk->bn"
x, [0, 1], w, [2, 1]       ->  "AB,CB->AC"
"bk,rk,nr->bn"             ->  "bk,rk->br", then "br,nr->bn"
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from string import ascii_letters, ascii_lowercase, ascii_uppercase
from typing import Any, NamedTuple

Names = list[str]
_ORDER = ascii_uppercase + ascii_lowercase  # that of einsum


class Pair(NamedTuple):
    """Two operands, by their places, and what multiplies them; the product takes the first place.

    `equation` has no ellipsis: the letters are new ones.
    """

    first: int
    second: int
    equation: str


def einsum_indices(equation: str, ndims: Sequence[int]) -> list[Names] | None:
    """The index names of two operands and of the result; None if the equation has another form.

    An ellipsis stands for the dimensions of its operand that have no name. They are aligned at the
    last one and shared between operands, as in einsum.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = [*inputs.split(","), output]
    if not arrow or len(terms) != len(ndims) + 1 or any(t.count("...") > 1 for t in terms):
        return None
    hidden = [
        max(0, n - len(t.replace("...", ""))) if "..." in t else 0
        for t, n in zip(terms, ndims, strict=False)
    ]
    unnamed = [f"...{i}" for i in range(max(hidden))]
    names = [
        _expand(term, last(unnamed, count))
        for term, count in zip(terms, (*hidden, len(unnamed)), strict=True)
    ]
    distinct = all(len(set(term)) == len(term) for term in names)
    fits = all(len(term) == n for term, n in zip(names, ndims, strict=False))
    return names if distinct and fits else None


def _expand(term: str, hidden: Names) -> Names:
    head, dots, tail = term.partition("...")
    return [*head, *(hidden if dots else []), *tail]


def last(names: Names, count: int) -> Names:
    """The last `count` names."""
    return names[len(names) - count :] if count > 0 else []


def equation_of(terms: Sequence[Sequence[Any]], result: Sequence[Any] | None) -> str:
    """The equation of lists of numbers, with letters in the same order; "..." for an ellipsis."""
    *inputs, out = (
        "".join("..." if i is Ellipsis else _ORDER[i] for i in term)
        for term in (*terms, result or ())
    )
    return ",".join(inputs) + ("" if result is None else f"->{out}")


def with_result(equation: str) -> str:
    """The equation with the result that it implies: the indices that occur once, in order."""
    if "->" in equation:
        return equation
    dots = "..." if "..." in equation else ""
    return f"{equation}->{dots}{''.join(i for i in _ORDER if equation.count(i) == 1)}"


def pairs(equation: str, ndims: Sequence[int], constant: Sequence[bool]) -> Iterator[Pair]:
    """Products of two that compute one of several; nothing if it has another form.

    Two constants last: x, a and w of a low-rank weight become (x a) w. Of the others the pair whose
    product has the fewest dimensions; these are the indices that are still needed.
    """
    names = einsum_indices(equation, ndims)
    distinct = dict.fromkeys(i for term in names or () for i in term)
    if names is None or len(distinct) > len(ascii_letters):
        return
    *terms, out = names
    known, letters = list(constant), dict(zip(distinct, ascii_letters, strict=False))

    def kept(pair: tuple[int, int]) -> Names:
        others = [term for at, term in enumerate(terms) if at not in pair]
        read = {*out, *(i for term in others for i in term)}
        return [i for i in dict.fromkeys(terms[pair[0]] + terms[pair[1]]) if i in read]

    def cost(pair: tuple[int, int]) -> tuple[bool, int]:
        return known[pair[0]] and known[pair[1]], len(kept(pair))

    while len(terms) > 1:
        first, second = pair = min(combinations(range(len(terms)), 2), key=cost)
        result = kept(pair) if len(terms) > 2 else out
        left, right, made = (
            "".join(map(letters.__getitem__, term))
            for term in (terms[first], terms[second], result)
        )
        yield Pair(first, second, f"{left},{right}->{made}")
        terms[first], known[first] = result, known[first] and known[second]
        del terms[second], known[second]
