"""Effects: what may write to memory or switch a mode is never taken for a plain computation."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fqcompile.passes.effects import effects_between, has_effects
from tests.passes.graphs import dynamo_graph


@torch.library.custom_op("fqcompile_tests::fill", mutates_args=("out",))
def fill(out: Tensor, x: Tensor) -> None:
    out.copy_(x)


@torch.library.custom_op("fqcompile_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


fill.register_fake(lambda out, x: None)
twice.register_fake(torch.empty_like)


def user_function(x: Any) -> Any:
    return x


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    given = [graph.placeholder(f"x{i}") for i in range(2)]
    chosen = args or (given[0],)
    if isinstance(target, str):
        return graph.call_method(target, (given[0], *args), kwargs)
    return graph.call_function(target, tuple(chosen), kwargs)


EFFECTS: dict[str, fx.Node] = {
    "add_": call("add_", 1),
    "copy_": call("copy_", 1),
    "iadd": call(operator.iadd),
    "imul": call(operator.imul),
    "setitem": call(operator.setitem),
    "Tensor.add_": call(torch.Tensor.add_),
    "out=": call(torch.add, out=1),
    "inplace by keyword": call(F.relu, inplace=True),
    "inplace by position": call(F.relu, 0, True),
    "dropout in place": call(F.dropout, 0, 0.5, True, True),
    "torch.relu_": call(torch.relu_),
    "aten overload": call(torch.ops.aten.add_.Tensor),
    "aten packet": call(torch.ops.aten.add_),
    "mutating custom overload": call(torch.ops.fqcompile_tests.fill.default),
    "mutating custom packet": call(torch.ops.fqcompile_tests.fill),
    "grad mode": call(torch._C._set_grad_enabled, False),
    "enter autocast": call(torch.amp.autocast_mode._enter_autocast, "cpu"),
    "exit autocast": call(torch.amp.autocast_mode._exit_autocast, 0),
    "enter inference": call(torch.autograd.grad_mode._enter_inference_mode, True),
    "exit inference": call(torch.autograd.grad_mode._exit_inference_mode, 0),
    "higher-order operator": call(torch.ops.higher_order.cond),
    "user function": call(user_function),
}
PURE: dict[str, fx.Node] = {
    "add": call(torch.add),
    "operator.add": call(operator.add),
    "operator.getitem": call(operator.getitem),
    "relu": call(F.relu),
    "relu, inplace=False": call(F.relu, inplace=False),
    "gelu": call(F.gelu),
    "silu builtin": call(torch._C._nn.gelu),
    "method": call("mul", 2),
    "dunder method": call("__add__", 2),
    "view": call("view", -1),
    "aten overload": call(torch.ops.aten.add.Tensor),
    "aten packet with an out overload": call(torch.ops.aten.add),
    "custom overload": call(torch.ops.fqcompile_tests.twice.default),
    "custom packet": call(torch.ops.fqcompile_tests.twice),
    "out=None": call(torch.add, out=None),
    "our own op": call(torch.ops.fqcompile.matmul.default),
}


@pytest.mark.parametrize("node", EFFECTS.values(), ids=list(EFFECTS))
def test_has_effects(node: fx.Node) -> None:
    assert has_effects(node), node.format_node()


@pytest.mark.parametrize("node", PURE.values(), ids=list(PURE))
def test_is_pure(node: fx.Node) -> None:
    assert not has_effects(node), node.format_node()


def _setitem(x: Tensor) -> Tensor:
    x[0] = 1
    return x.sum()


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x


def _no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x @ x


def _custom(x: Tensor) -> Tensor:
    torch.ops.fqcompile_tests.fill(x, x * 2)
    return x.sum()


TRACED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "setitem": (_setitem, 1),
    "autocast": (_autocast, 2),
    "no_grad": (_no_grad, 2),
    "custom op": (_custom, 1),
    "relu_": (lambda x: F.relu(x, inplace=True), 1),
    "pure": (lambda x: F.silu(x) + x.view(-1, 4)[0].sum(), 0),
}


@pytest.mark.parametrize(("function", "count"), TRACED.values(), ids=list(TRACED))
def test_what_dynamo_writes_down_is_recognized(
    function: Callable[[Tensor], Tensor], count: int
) -> None:
    graph = dynamo_graph(function, torch.randn(4, 4), grad=True).module.graph
    found = [n for n in graph.nodes if has_effects(n)]
    assert len(found) == count, [n.format_node() for n in found]


def test_effects_between_looks_strictly_between() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_method("add_", (x, 1))
    middle = graph.call_function(torch.relu, (x,))
    last = graph.call_method("mul_", (x, 2))
    after = graph.call_function(torch.relu, (x,))
    assert not effects_between(first, last)
    assert not effects_between(first, middle)
    assert effects_between(middle, after)
    with pytest.raises(AssertionError, match="does not come after"):
        effects_between(last, first)
