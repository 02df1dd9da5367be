"""fuse: what must not fire. Each graph differs from one of its drawings in a single thing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.passes.fuse import fuse
from fqcompile.passes.op_nodes import argument
from tests.passes.graphs import assert_same, run_passes, weight

W = [weight(64, 64, i) for i in range(4)]
B = torch.randn(64)
X, Y = torch.randn(6, 64), torch.randn(6, 64)
Result = Tensor | tuple[Tensor, ...]


def two_users(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    return F.relu(y), y


def two_users_of_a_sum(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    return y + r, y * 2


def in_place_with_a_second_user(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    z = F.relu(y, inplace=True)
    return z, y + 1


def iadd_on_the_residual(x: Tensor, r: Tensor) -> Result:
    r += F.linear(x, W[0])
    return r


def iadd_on_another_linear(x: Tensor, r: Tensor) -> Result:
    a, b = F.linear(x, W[0]), F.linear(r, W[1])
    y = a
    y += b
    return y, a * 2


def residual_written_in_between(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    r.add_(1)
    return y + r


def x_written_before_the_activation(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    x.add_(1)
    return F.relu(y) + x


def x_written_before_the_bias(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    x.zero_()
    return y + B


def slice_of_x_written(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    x[:, 0] = 7
    return F.gelu(y)


def autocast_ends_in_between(x: Tensor, r: Tensor) -> Result:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, W[0])
    return F.relu(y)


def cast_in_between(x: Tensor, r: Tensor) -> Result:
    return F.relu(F.linear(x, W[0]).to(torch.bfloat16))


def sum_with_another_dtype(x: Tensor, r: Tensor) -> Result:
    return F.linear(x, W[0]) + r.double(), F.linear(r, W[1]) + x.bfloat16()


def view_as_bits(x: Tensor, r: Tensor) -> Result:
    return F.linear(x.view(-1, 64), W[0]).view(torch.int32)


def view_that_splits_rows(x: Tensor, r: Tensor) -> Result:
    return F.linear(x.view(-1, 64), W[0]).view(12, 32)


SINGLE: dict[str, tuple[Callable[..., Result], str]] = {
    "activation of a shared result": (two_users, "relu"),
    "sum with a shared result": (two_users_of_a_sum, "add"),
    "in-place activation of a shared result": (in_place_with_a_second_user, "relu"),
    "iadd on the residual": (iadd_on_the_residual, "iadd"),
    "iadd on another linear": (iadd_on_another_linear, "iadd"),
    "residual written": (residual_written_in_between, "add"),
    "x written before the activation": (x_written_before_the_activation, "relu"),
    "x written before the bias": (x_written_before_the_bias, "add"),
    "slice of x written": (slice_of_x_written, "gelu"),
    "autocast ends": (autocast_ends_in_between, "relu"),
    "cast before the activation": (cast_in_between, "relu"),
    "sum with another dtype": (sum_with_another_dtype, "add"),
    "view as bits": (view_as_bits, "view"),
    "view that splits rows": (view_that_splits_rows, "view"),
    "alpha": (lambda x, r: torch.add(F.linear(x, W[0]), r, alpha=2), "add"),
    "row bias with alpha": (lambda x, r: torch.add(F.linear(x, W[0]), B, alpha=0.5), "add"),
    "number": (lambda x, r: F.linear(x, W[0]) + 2.0, "add"),
    "residual broadcast over rows": (lambda x, r: F.linear(x, W[0]) + r[:1], "add"),
    "residual broadcast over columns": (lambda x, r: F.linear(x, W[0]) + r[:, :1], "add"),
    "residual larger than the result": (lambda x, r: F.linear(x, W[0]) + r.expand(2, 6, 64), "add"),
    "sum with itself": (lambda x, r: (lambda y: y + y)(F.linear(x, W[0])), "add"),
    "residual that sets the layout": (
        lambda x, r: (r.view(64, 6).t() + F.linear(x, W[0])).t().view(8, 48),
        "add",
    ),
    "subtraction": (lambda x, r: F.linear(x, W[0]) - r, "sub"),
    "unknown activation": (lambda x, r: F.elu(F.linear(x, W[0])), "elu"),
    "leaky relu": (lambda x, r: F.leaky_relu(F.linear(x, W[0])), "leaky_relu"),
    "bias after the activation": (lambda x, r: F.relu(F.linear(x, W[0])) + B, "add"),
    "activation after the residual": (lambda x, r: F.relu(F.linear(x, W[0]) + r), "relu"),
}


@pytest.mark.parametrize(("forward", "left"), SINGLE.values(), ids=list(SINGLE))
def test_left_alone(forward: Callable[..., Result], left: str) -> None:
    run = run_passes(forward, X, Y)
    assert run.ops[left] >= 1, dict(run.ops)
    if not run.ops["_enter_autocast"]:  # bf16 results; the tolerance is for fp32
        assert_same(run)


def test_second_activation_stays() -> None:
    run = run_passes(lambda x: F.silu(F.relu(F.linear(x, W[0]))), X)
    assert dict(run.ops) == {"fq": 1, "silu": 1}
    assert_same(run)


def test_second_residual_stays() -> None:
    run = run_passes(lambda x, r: F.linear(x, W[0]) + r + r * 2, X, Y)
    assert run.ops["add"] == 1
    assert_same(run)


GATES: dict[str, Callable[[Tensor, Tensor], Result]] = {
    "two inputs": lambda x, r: F.silu(F.linear(x, W[0])) * F.linear(r, W[1]),
    "no activation": lambda x, r: F.linear(x, W[0]) * F.linear(x, W[1]),
    "two activations": lambda x, r: F.silu(F.linear(x, W[0])) * F.silu(F.linear(x, W[1])),
    "bias on one": lambda x, r: F.silu(F.linear(x, W[0], B)) * F.linear(x, W[1]),
    "up used twice": lambda x, r: (lambda u: F.silu(F.linear(x, W[0])) * u + u)(F.linear(x, W[1])),
    "residual on the gate": lambda x, r: (F.silu(F.linear(x, W[0])) + r) * F.linear(x, W[1]),
    "different widths": lambda x, r: F.silu(F.linear(x, W[0])) * F.linear(x, W[1][:1]),
}


@pytest.mark.parametrize("forward", GATES.values(), ids=list(GATES))
def test_not_a_gate_and_up(forward: Callable[..., Result]) -> None:
    run = run_passes(forward, X, Y)
    assert not any(argument(op, "gated") for op in run.linears)
    assert run.ops["mul"] == 1
    assert_same(run)


def test_gate_and_up_of_different_bits_stay_apart() -> None:
    gate, up = W[:2]
    run = run_passes(
        lambda x: F.silu(F.linear(x, gate)) * F.linear(x, up), X, overrides={"^up$": {"bits": 8}}
    )
    assert dict(run.ops) == {"fq": 2, "mul": 1}
    assert_same(run)


def sibling_after_a_write(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    x.add_(1)
    return y, F.linear(x, W[1])


def sibling_in_another_mode(x: Tensor, r: Tensor) -> Result:
    y = F.linear(x, W[0])
    with torch.enable_grad():
        return y, F.linear(x, W[1])


SIBLINGS: dict[str, Callable[[Tensor, Tensor], Result]] = {
    "different inputs": lambda x, r: (F.linear(x, W[0]), F.linear(r, W[1])),
    "bias on one": lambda x, r: (F.linear(x, W[0], B), F.linear(x, W[1])),
    "x written in between": sibling_after_a_write,
    "grad mode in between": sibling_in_another_mode,
    "bias that is not there yet": lambda x, r: (lambda y: (y, F.linear(x, W[1], y.sum(0))))(
        F.linear(x, W[0], B)
    ),
}


@pytest.mark.parametrize("forward", SIBLINGS.values(), ids=list(SIBLINGS))
def test_not_siblings(forward: Callable[..., Result]) -> None:
    run = run_passes(forward, X, Y)
    assert run.ops["fq"] == 2
    assert_same(run)


def test_siblings_without_a_common_group_size_stay_apart() -> None:
    a, b = weight(64, 96), weight(64, 96, 1)
    overrides = {"^a$": {"granularity": 48}}
    run = run_passes(
        lambda x: (F.linear(x, a), F.linear(x, b)), torch.randn(3, 96), overrides=overrides
    )
    assert [argument(op, "group_size") for op in run.linears] == [48, 32]
    assert_same(run)


def test_unknown_gelu_stays() -> None:
    """`approximate` that a later torch may add; the graph is edited, as eager would refuse it."""
    from_graph = run_passes(lambda x: F.gelu(F.linear(x, W[0])), X, until="rewrite")
    (gelu,) = (n for n in from_graph.state.graph.nodes if "gelu" in str(n.target))
    gelu.kwargs = {"approximate": "sigmoid"}
    assert fuse(from_graph.state) == 0
