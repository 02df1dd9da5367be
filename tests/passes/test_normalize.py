"""normalize: calls written in several ways become one, and what has no such spelling stays."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fqcompile.config import FineQuantConfig
from fqcompile.passes.normalize import normalize
from fqcompile.passes.state import GraphState

W, X, B = torch.randn(6, 4), torch.randn(3, 4), torch.randn(6)
STACK, ROWS = torch.randn(5, 4, 6), torch.randn(5, 3, 4)
aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def spelled(target: Any, *args: Any, **kwargs: Any) -> tuple[Call, Tensor, GraphState]:
    """The one call of a graph after the pass, with the names of its inputs; what it computes."""
    graph, values = fx.Graph(), {}

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            node = graph.placeholder(f"i{len(values)}")
            node.meta["example_value"] = values[node] = value
            return node
        return [put(one) for one in value] if isinstance(value, list) else value

    call = graph.call_method if isinstance(target, str) else graph.call_function
    node = call(target, tuple(map(put, args)), {key: put(kwargs[key]) for key in kwargs})
    graph.output(node)
    module = fx.GraphModule({}, graph)
    empty: dict[str, Any] = {"constants": {}, "named": {}, "written": {}, "known": {}}
    given = [*values.values()]
    state = GraphState(module, given, FineQuantConfig(), **empty, grad_possible=False)
    normalize(state)
    graph.lint()
    module.recompile()

    def name(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(name(one) for one in value)
        return value.name if isinstance(value, fx.Node) else value

    kwargs = {key: name(value) for key, value in node.kwargs.items()}
    return (node.target, name(node.args), kwargs), module(*values.values()), state


SPELLINGS: dict[str, tuple[list[Any], dict[str, Any], Call]] = {
    "keywords": (
        [F.linear],
        {"input": X, "weight": W, "bias": B},
        (F.linear, ("i0", "i1", "i2"), {}),
    ),
    "defaults": ([F.linear, X, W], {}, (F.linear, ("i0", "i1", None), {})),
    "method of an operator": (["__matmul__", X, W.t()], {}, ("matmul", ("i0", "i1"), {})),
    "keyword of a method": (["mm", X], {"mat2": W.t()}, ("mm", ("i0", "i1"), {})),
    "keywords that stay": (
        [torch.addmm, B, X, W.t()],
        {"alpha": 2},
        (torch.addmm, ("i0", "i1", "i2"), {"beta": 1, "alpha": 2}),
    ),
    "operands in a list": (
        [torch.einsum, "ik,nk->in", [X, W]],
        {},
        (torch.einsum, ("ik,nk->in", "i0", "i1"), {}),
    ),
    "operands of aten": (
        [aten.einsum.default, "ik,nk->in", [X, W]],
        {},
        (torch.einsum, ("ik,nk->in", "i0", "i1"), {}),
    ),
    "implicit result": (
        [torch.einsum, "...k,nk", ROWS, W],
        {},
        (torch.einsum, ("...k,nk->...n", "i0", "i1"), {}),
    ),
    "lists of numbers": (
        [torch.einsum, X, [0, 1], W, [27, 1]],
        {},
        (torch.einsum, ("AB,bB->Ab", "i0", "i1"), {}),
    ),
    "tensordot": (
        [torch.tensordot, STACK, W, 1],
        {},
        (torch.einsum, ("abc,ce->abe", "i0", "i1"), {}),
    ),
    "tensordot of aten": (
        [aten.tensordot.default, ROWS, W, [2], [1]],
        {},
        (torch.einsum, ("abc,dc->abd", "i0", "i1"), {}),
    ),
    "inner": (["inner", ROWS, W], {}, (torch.einsum, ("abc,dc->abd", "i0", "i1"), {})),
    "linalg": ([torch.linalg.matmul, X, W.t()], {}, (torch.matmul, ("i0", "i1"), {})),
    "convolution": (
        [aten.convolution.default, ROWS.mT, W[..., None], B, [1], [0], [1], False, [0], 1],
        {},
        (torch.conv1d, ("i0", "i1", "i2", [1], [0], [1], 1), {}),
    ),
    "names of aten": (
        [aten.bmm.default],
        {"self": ROWS, "mat2": STACK},
        (aten.bmm.default, ("i0", "i1"), {}),
    ),
    "chunk": ([torch.chunk, W, 2], {"dim": -1}, (torch.chunk, ("i0", 2, -1), {})),
    "split": (["split", W, [2, 4]], {}, ("split", ("i0", [2, 4], 0), {})),
    "split of sizes": (
        [aten.split_with_sizes.default, W, [2, 4]],
        {},
        ("split", ("i0", [2, 4], 0), {}),
    ),
    "narrow": (
        [torch.narrow],
        {"input": W, "dim": 0, "start": 1, "length": 2},
        (torch.narrow, ("i0", 0, 1, 2), {}),
    ),
    "swapaxes": ([torch.swapaxes, W, 0, 1], {}, ("transpose", ("i0", 0, 1), {})),
    "slice": (
        [aten.slice.Tensor, W, 1, 0, 3],
        {},
        (operator.getitem, ("i0", (slice(None), slice(0, 3, None))), {}),
    ),
    "index": (
        [aten.index.Tensor, W, [torch.tensor([1])]],
        {},
        (operator.getitem, ("i0", "i1"), {}),
    ),
    "item": (["__getitem__", W, 2], {}, (operator.getitem, ("i0", 2), {})),
    "adjoint": ([aten.mH.default, W], {}, ("adjoint", ("i0",), {})),
    "transpose of a matrix": ([aten.numpy_T.default, W], {}, ("t", ("i0",), {})),
    "unsafe view": ([aten._unsafe_view.default, W, [4, 6]], {}, ("reshape", ("i0", [4, 6]), {})),
    "copy": (
        [aten._to_copy.default, W],
        {"dtype": torch.float64, "layout": torch.strided},
        ("to", ("i0",), {"dtype": torch.float64, "copy": True}),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_call_has_one_spelling_that_computes_the_same(name: str) -> None:
    (target, *args), kwargs, want = SPELLINGS[name]
    call, got, state = spelled(target, *args, **kwargs)
    assert call == want
    assert len(state.matched) == 1
    function = target if callable(target) else getattr(torch.Tensor, target)
    expected = function(*args, **kwargs)
    # Sums of at most 6 products, perhaps in another order: 6 u Σ|x w|, below 2^-17.
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-17, check_stride=True)


STAY: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "as it is to be": ([F.linear, X, W, B], {}),
    "not in the table": ([torch.softmax, X], {"dim": -1}),
    "written into a buffer": ([torch.matmul, X, W.t()], {"out": torch.empty(3, 6)}),
    "three operands": ([torch.einsum, "ik,nk,n->in", X, W, B], {}),
    "a size, by its own name": (["split", W], {"split_size": 3}),
}


@pytest.mark.parametrize("name", STAY)
def test_other_calls_stay_as_they_are(name: str) -> None:
    (target, *args), kwargs = STAY[name]
    call, _, state = spelled(target, *args, **kwargs)
    assert call[0] == target
    assert (len(call[1]), call[2].keys()) == (len(args), kwargs.keys())
    assert state.matched == []


@pytest.mark.parametrize("name", SPELLINGS)
def test_second_run_changes_nothing(name: str) -> None:
    (target, *args), kwargs, _ = SPELLINGS[name]
    state = spelled(target, *args, **kwargs)[2]
    code, state.matched = state.module.code, []
    assert normalize(state) == 0
    state.module.recompile()
    assert state.module.code == code
