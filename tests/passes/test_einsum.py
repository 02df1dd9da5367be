"""Einsum equations read as a linear layer: the steps give what torch.einsum gives."""

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.passes.einsum import LinearEinsum, Step, linear_einsum

SIZES = dict(zip(string.ascii_lowercase, [2, 3, 4, 5, 6, 7, 2, 3, 4, 5], strict=False))


def apply(value: Tensor, steps: tuple[Step, ...]) -> Tensor:
    for method, args in steps:
        value = getattr(value, method)(*args)
    return value


def through_linear(plan: LinearEinsum, x: Tensor, weight: Tensor) -> Tensor:
    matrix = apply(weight, plan.weight_steps)
    assert matrix.dim() == 2
    return apply(apply(x, plan.x_steps) @ matrix.t(), plan.out_steps)


def shape(term: str) -> tuple[int, ...]:
    return tuple(SIZES[i] for i in term)


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, str, str]:
    """x, weight and result of a linear layer, each with its indices in any order."""
    letters = draw(st.permutations(list(SIZES)), label="letters")
    b = draw(st.integers(0, 2), label="batch indices")
    k = draw(st.integers(1, 2), label="contracted indices")
    n = draw(st.integers(1, 2), label="free indices")
    batch, contracted, free = letters[:b], letters[b : b + k], letters[b + k : b + k + n]
    order = [
        draw(st.permutations(t)) for t in (batch + contracted, contracted + free, batch + free)
    ]
    return "".join(order[0]), "".join(order[1]), "".join(order[2])


@given(terms=equations(), weight_first=st.booleans(), spaces=st.booleans())
def test_every_linear_equation_is_read(
    terms: tuple[str, str, str], weight_first: bool, spaces: bool
) -> None:
    x_term, w_term, out = terms
    x, weight = torch.randn(shape(x_term)).double(), torch.randn(shape(w_term)).double()
    operands = (weight, x) if weight_first else (x, weight)
    left, right = (w_term, x_term) if weight_first else (x_term, w_term)
    equation = f"{left}, {right} -> {out}" if spaces else f"{left},{right}->{out}"
    plan = linear_einsum(equation, 0 if weight_first else 1, tuple(weight.shape), tuple(x.shape))
    assert plan is not None, equation
    want = torch.einsum(equation, *operands)
    torch.testing.assert_close(
        through_linear(plan, x, weight), want, msg=lambda m: f"{equation}: {m}"
    )


@pytest.mark.parametrize("equation", ["...d,nd->...n", "d...,nd->n...", "a...d,nd->a...n"])
def test_ellipsis_on_x_stands_for_any_dimensions(equation: str) -> None:
    x, weight = torch.randn(4, 3, 4), torch.randn(5, 4)
    plan = linear_einsum(equation, 1, (5, 4), (4, 3, 4))
    assert plan is not None
    torch.testing.assert_close(through_linear(plan, x, weight), torch.einsum(equation, x, weight))


NOT_LINEAR = {
    "implicit result": ("ij,jk", (3, 4), (2, 3)),
    "shared batch": ("bk,bnk->bn", (2, 5, 3), (2, 3)),
    "diagonal of x": ("bkk,nk->bn", (5, 3), (2, 3, 3)),
    "diagonal of the weight": ("bk,kk->bk", (3, 3), (2, 3)),
    "x summed": ("bsk,nk->bn", (5, 3), (2, 4, 3)),
    "weight summed": ("bk,nk->b", (5, 3), (2, 3)),
    "nothing contracted": ("b,n->bn", (5,), (2,)),
    "nothing free": ("bk,k->b", (3,), (2, 3)),
    "ellipsis on the weight": ("bk,...k->b...", (5, 3), (2, 3)),
    "three operands": ("bk,nk,n->bn", (5, 3), (2, 3)),
    "K broadcast from x": ("bk,nk->bn", (5, 3), (2, 1)),
    "K broadcast from the weight": ("bk,nk->bn", (5, 1), (2, 3)),
    "two ellipses": ("...k...,nk->...n", (5, 3), (2, 3)),
}


@pytest.mark.parametrize(("equation", "weight", "x"), NOT_LINEAR.values(), ids=list(NOT_LINEAR))
def test_what_is_no_linear_layer_is_declined(
    equation: str, weight: tuple[int, ...], x: tuple[int, ...]
) -> None:
    assert linear_einsum(equation, 1, weight, x) is None
