"""Graphs of aten operators, as exported programs hold them: read as the model's own code is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines the operator)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fqcompile.passes.op_nodes import argument
from tests.helpers import assert_close
from tests.passes import test_expert_forms, test_match
from tests.passes.graphs import assert_same, run_passes, weight
from tests.passes.test_fuse import ACTIVATIONS

W = [weight(64, 64, i) for i in range(3)]
BIAS = torch.randn(64)
X, Y = torch.randn(6, 64), torch.randn(6, 64)


class Calls(nn.Module):
    """A function as a module, which is what can be exported."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def exported(function: Callable[..., Any], *args: Tensor) -> Callable[..., Any]:
    return torch.export.export(Calls(function), args).module()


def decomposed(function: Callable[..., Any], *args: Tensor) -> Callable[..., Any]:
    return torch.export.export(Calls(function), args).run_decompositions().module()


def traced(function: Callable[..., Any], *args: Tensor) -> Callable[..., Any]:
    graph: Callable[..., Any] = make_fx(function)(*args)
    return graph


WRITERS = [exported, decomposed, traced]
# mv becomes a product and a sum; `squeeze_` changes the shape that Dynamo notes of the product.
GONE = {
    ("weight times a vector", "decomposed"),
    ("weight @ vector", "decomposed"),
    ("@ of a vector", "traced"),
}


# Decomposed into a product whose batch is not the ids': two dimensions of them in one, or one id
# for several rows.
OTHER_BATCH = {
    f"gathered, {name}"
    for name in ("einsum", "einsum, x of each", "broadcast x", "one vector", "one id for all")
}


@pytest.mark.few(9)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", test_match.FORMS)
def test_form_of_a_linear_is_one_site(name: str, write: Callable[..., Any]) -> None:
    forward, x = test_match.FORMS[name]
    run = run_passes(write(forward, x), x)
    assert run.counts["rewrite"] == ((name, write.__name__) not in GONE), run.state.matched
    assert_same(run)


@pytest.mark.few(6)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", test_match.NEAR_MISSES)
def test_near_miss_computes_the_same(name: str, write: Callable[..., Any]) -> None:
    """Some are written as a form that is one: an einsum that sums the weight first, as mm."""
    forward, x = test_match.NEAR_MISSES[name]
    run = run_passes(write(forward, x), x)
    if write is exported:
        assert run.counts["match"] == 0, run.state.matched
    if not any("sum" in site.recipe.key for site in run.state.sites):  # has no one place
        assert_same(run)


@pytest.mark.few(9)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", test_expert_forms.ALL)
def test_form_of_experts_is_one_site(name: str, write: Callable[..., Any]) -> None:
    forward, x, routing = test_expert_forms.ALL[name]
    run = run_passes(write(forward, x, routing), x, routing, granularity=8)
    gone = write is not exported and name in OTHER_BATCH
    assert run.counts["rewrite"] == (not gone), run.state.matched
    assert_same(run)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", test_expert_forms.BF16)
def test_grouped_mm_is_one_site(name: str, write: Callable[..., Any]) -> None:
    forward, x, offsets = test_expert_forms.BF16[name]
    x = x.bfloat16()
    run = run_passes(write(forward, x, offsets), x, offsets, granularity=8)
    assert run.counts["rewrite"] == 1, run.state.matched
    assert_close(run.outputs()[0], run.expected()[0])


@pytest.mark.few(9)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("activation", "name"), ACTIVATIONS.values(), ids=list(ACTIVATIONS))
def test_activation_and_sum_move_into_the_op(
    activation: Callable[[Tensor], Tensor], name: str, write: Callable[..., Any]
) -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return F.linear(activation(F.linear(x, W[0], BIAS)), W[1]) + y

    run = run_passes(write(forward, X, Y), X, Y)
    first, second = run.linears
    silu = name == "silu" and write is decomposed  # which becomes y * sigmoid(y)
    assert argument(first, "bias") is not None
    assert argument(first, "activation") == ("none" if silu else name.removesuffix("_"))
    assert argument(second, "residual") is not None
    assert_same(run)
