"""Matmuls read as roles of indices: what rewriting arranges by them is what torch computes."""

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fqcompile.passes.einsum import einsum_indices
from fqcompile.passes.fold import Emitter
from fqcompile.passes.match import contraction
from fqcompile.passes.rewrite import arranged, arranged_back, sizes_of
from fqcompile.passes.state import Contraction

SIZES = dict(zip(string.ascii_lowercase, [2, 3, 4, 5, 6, 7, 2, 3, 4, 5], strict=False))


def einsum(equation: str, *operands: Tensor) -> fx.Node:
    """A graph of this one call; its inputs are `i0`, `i1`, ..."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"i{i}") for i in range(len(operands))]
    node = graph.call_function(torch.einsum, (equation, *nodes))
    values = (*operands, torch.einsum(equation, *operands))
    for one, value in zip([*nodes, node], values, strict=True):
        one.meta["example_value"] = value
    graph.output(node)
    return node


def read(node: fx.Node, position: int) -> Contraction | None:
    """With the operand at this position as the constant."""
    return contraction(node, lambda operand: operand is node.args[1 + position])


def through_linear(node: fx.Node, roles: Contraction) -> Tensor:
    """The call's value as a linear layer makes it of the matrix [N, K]."""
    matrix: Tensor = roles.stack.meta["example_value"]
    for method, args in roles.weight_steps:
        matrix = getattr(matrix, method)(*args)
    assert matrix.dim() == 2
    emit = Emitter(node.graph).at(node)
    out = node.meta["example_value"]
    sizes = sizes_of(emit, roles, roles.x, out)
    x = arranged(emit, roles, roles.x, sizes, matrix.shape[1])
    rows = node.graph.call_function(torch.matmul, (x,))
    rows.meta["example_value"] = x.meta["example_value"] @ matrix.t()
    value: Tensor = arranged_back(emit, roles, rows, None, sizes, out)[1].meta["example_value"]
    return value


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
    node = einsum(equation, *operands)
    roles = read(node, 0 if weight_first else 1)
    assert roles is not None and not roles.of_experts, equation
    got, want = through_linear(node, roles), torch.einsum(equation, *operands)
    assert got.stride() == want.stride(), equation
    torch.testing.assert_close(got, want, msg=lambda m: f"{equation}: {m}")


@pytest.mark.parametrize("equation", ["...d,nd->...n", "d...,nd->n...", "a...d,nd->a...n"])
def test_ellipsis_on_x_stands_for_any_dimensions(equation: str) -> None:
    node = einsum(equation, x := torch.randn(4, 3, 4), weight := torch.randn(5, 4))
    roles = read(node, 1)
    assert roles is not None
    torch.testing.assert_close(through_linear(node, roles), torch.einsum(equation, x, weight))


NOT_LINEAR = {
    "implicit result": ("ij,jk", (3, 4), (2, 3)),
    "diagonal of x": ("bkk,nk->bn", (5, 3), (2, 3, 3)),
    "diagonal of the weight": ("bk,kk->bk", (3, 3), (2, 3)),
    "x summed": ("bsk,nk->bn", (5, 3), (2, 4, 3)),
    "weight summed": ("bk,nk->b", (5, 3), (2, 3)),
    "nothing contracted": ("b,n->bn", (5,), (2,)),
    "nothing free": ("bk,k->b", (3,), (2, 3)),
    "ellipsis on the weight": ("bk,...k->b...", (5, 3), (2, 3)),
    "K broadcast from x": ("bk,nk->bn", (5, 3), (2, 1)),
    "K broadcast from the weight": ("bk,nk->bn", (5, 1), (2, 3)),
}


@pytest.mark.parametrize(("equation", "weight", "x"), NOT_LINEAR.values(), ids=list(NOT_LINEAR))
def test_what_is_no_linear_layer_is_declined(
    equation: str, weight: tuple[int, ...], x: tuple[int, ...]
) -> None:
    assert read(einsum(equation, torch.randn(x), torch.randn(weight)), 1) is None


def test_a_shared_batch_numbers_experts() -> None:
    roles = read(einsum("bk,bnk->bn", torch.randn(2, 3), torch.randn(2, 5, 3)), 1)
    assert roles is not None and roles.of_experts
    assert (roles.batch, roles.rows, roles.free) == (("b",), (), ("n",))


def test_two_ellipses_of_one_operand_are_no_equation() -> None:
    assert einsum_indices("...k...,nk->...n", (2, 2)) is None


def test_a_third_operand_is_declined() -> None:
    operands = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
    assert read(einsum("bk,nk,n->bn", *operands), 1) is None
