"""fuse: each drawing of its docstring, before -> after, in node counts and in values."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.passes.fuse import fuse
from fqcompile.passes.op_nodes import argument
from tests.passes.graphs import Run, assert_same, run_passes, weight

W = [weight(64, 64, i) for i in range(4)]
TALL = weight(96, 64, 9)
BIASES = [torch.randn(64) for _ in range(3)]
X, Y = torch.randn(6, 64), torch.randn(6, 64)
X3 = torch.randn(2, 3, 64)


def fused(run: Run, **expected: object) -> None:
    """One op is left, with these arguments, and it computes the same."""
    (op,) = run.linears
    got = {name: argument(op, name) for name in expected}
    got |= {name: value is not None for name, value in got.items() if name in ("bias", "residual")}
    assert got == expected
    assert_same(run)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "F.relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "Tensor.relu": (lambda y: y.relu(), "relu"),
    "relu in place": (lambda y: F.relu(y, inplace=True), "relu"),
    "Tensor.relu_": (lambda y: y.relu_(), "relu_"),
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "silu": (F.silu, "silu"),
    "silu in place": (lambda y: F.silu(y, inplace=True), "silu"),
}


@pytest.mark.parametrize(("activation", "name"), ACTIVATIONS.values(), ids=list(ACTIVATIONS))
def test_activation_moves_into_the_op(activation: Callable[[Tensor], Tensor], name: str) -> None:
    run = run_passes(lambda x: activation(F.linear(x, W[0], BIASES[0])), X)
    assert run.ops == {"fq": 1}
    fused(run, activation=name.removesuffix("_"), bias=True, gated=False)


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda y, r: y + r,
    "reversed": lambda y, r: r + y,
    "torch.add": lambda y, r: torch.add(y, r),
    "Tensor.add": lambda y, r: y.add(r),
}


def iadd(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


@pytest.mark.parametrize("add", [*SUMS.values(), iadd], ids=[*SUMS, "+="])
def test_bias_moves_into_the_op(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    run = run_passes(lambda x: add(F.linear(x, W[0]), BIASES[0]), X3)
    assert run.ops == {"fq": 1}
    fused(run, bias=True, residual=False)


@pytest.mark.parametrize("add", [*SUMS.values(), iadd], ids=[*SUMS, "+="])
def test_residual_moves_into_the_op(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    run = run_passes(lambda x, r: add(F.gelu(F.linear(x, W[0], BIASES[0])), r), X, Y)
    assert run.ops == {"fq": 1}
    fused(run, bias=True, residual=True, activation="gelu")


def test_sum_of_two_linears_keeps_one_as_residual() -> None:
    run = run_passes(lambda x, y: F.linear(x, W[0]) + F.linear(y, W[1]), X, Y)
    assert run.ops == {"fq": 2}
    assert [argument(op, "residual") is not None for op in run.linears] == [False, True]
    assert_same(run)


def test_views_around_the_op_go() -> None:
    """GPT-2's Conv1D, with what follows it fused through the views."""

    def conv1d(x: Tensor) -> Tensor:
        return F.gelu(torch.addmm(BIASES[0], x.view(-1, 64), W[0]).view(2, 3, 64)) + x

    run = run_passes(conv1d, X3)
    assert run.ops == {"fq": 1}
    fused(run, bias=True, residual=True, activation="gelu")


def test_views_go_whatever_stands_between_them() -> None:
    run = run_passes(lambda x: torch.relu(x.view(-1, 64) @ W[0] + BIASES[0]).view(2, 3, 64), X3)
    assert run.ops == {"fq": 1}
    fused(run, bias=True, activation="relu")


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: F.silu(F.linear(x, W[0])) * F.linear(x, W[1]),
    "reversed": lambda x: F.linear(x, W[1]) * F.silu(F.linear(x, W[0])),
    "gelu with biases": lambda x: (
        F.gelu(F.linear(x, W[0], BIASES[0])) * F.linear(x, W[1], BIASES[1])
    ),
    "torch.mul": lambda x: torch.mul(F.silu(F.linear(x, W[0])), F.linear(x, W[1])),
}


@pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))
def test_gate_and_up_become_one_op(gate: Callable[[Tensor], Tensor]) -> None:
    run = run_passes(gate, X3)
    assert run.ops["fq"] == 1
    assert set(run.ops) <= {"fq", "cat"}
    (op,) = run.linears
    assert (argument(op, "gated"), argument(op, "n")) == (True, 64)
    assert run.state.packed[op].rows == 128
    assert len([n for n in run.state.graph.nodes if n.op == "placeholder" and "fq_" in n.name]) == 2
    assert_same(run)


def test_gated_op_takes_a_residual() -> None:
    run = run_passes(lambda x, r: F.silu(F.linear(x, W[0])) * F.linear(x, W[1]) + r, X, Y)
    assert run.ops == {"fq": 1}
    fused(run, gated=True, residual=True, activation="silu")


def test_siblings_become_one_op_and_slices() -> None:
    run = run_passes(lambda x: (F.linear(x, W[0]), F.linear(x, W[1]), F.linear(x, TALL)), X3)
    assert (run.ops["fq"], run.ops["narrow"]) == (1, 3)
    (op,) = run.linears
    assert argument(op, "n") == 224
    assert [s.op for s in run.state.sites] == [op] * 3
    assert_same(run)


def test_siblings_with_biases_join_them() -> None:
    run = run_passes(lambda x: tuple(F.linear(x, w, b) for w, b in zip(W, BIASES, strict=False)), X)
    assert (run.ops["fq"], run.ops["cat"]) == (1, 1)
    assert_same(run)


def test_siblings_with_different_group_sizes_meet_at_the_finest() -> None:
    a, b, c = W[:3]
    overrides = {"^a$": {"granularity": "column"}, "^b$": {"granularity": 16}}
    run = run_passes(
        lambda x: (F.linear(x, a), F.linear(x, b), F.linear(x, c)), X, overrides=overrides
    )
    (op,) = run.linears
    assert argument(op, "group_size") == run.state.packed[op].group_size == 16
    assert [site.plan.group_size for site in run.state.sites] == [64, 16, 32]
    assert_same(run)


def test_siblings_that_do_not_fit_the_first_still_join_each_other() -> None:
    a, b, c = W[:3]
    run = run_passes(
        lambda x: (F.linear(x, a), F.linear(x, b), F.linear(x, c)),
        X,
        overrides={"^a$": {"bits": 8}},
    )
    assert [argument(op, "n") for op in run.linears] == [64, 128]
    assert_same(run)


@pytest.mark.parametrize("x", [X[:1], X[0], X[:0]], ids=["one row", "1-D", "no rows"])
def test_siblings_share_no_memory(x: Tensor) -> None:
    """With one row a slice of the columns is contiguous already; it must be a copy all the same."""
    run = run_passes(lambda x: (F.linear(x, W[0]), F.linear(x, W[1])), x)
    assert run.ops["fq"] == 1
    first, second = run.outputs()
    assert (
        not x.numel() or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    )
    assert first.is_contiguous()
    assert_same(run)


def test_where_gradients_are_possible_only_bias_and_siblings_fuse() -> None:
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        y, z = F.linear(x, W[0]) + BIASES[0], F.linear(x, W[1], BIASES[1])
        return F.relu(y), z + x

    run = run_passes(forward, X, grad=True)
    assert (run.ops["fq"], run.ops["relu"], run.ops["narrow"]) == (1, 1, 2)
    assert_same(run)


def test_decoder_layer_ends_as_four_ops() -> None:
    q, k, v, o = W
    gate, up, down = weight(96, 64, 5), weight(96, 64, 6), weight(64, 96, 7)

    def layer(x: Tensor) -> Tensor:
        h = F.layer_norm(x, (64,))
        a = F.scaled_dot_product_attention(F.linear(h, q), F.linear(h, k), F.linear(h, v))
        x = x + F.linear(a, o)
        h = F.layer_norm(x, (64,))
        return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

    run = run_passes(layer, X3)
    assert run.ops["fq"] == 4
    assert_same(run)
    assert fuse(run.state) == 0


PROGRAMS: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "activation": (lambda x: F.relu(F.linear(x, W[0], BIASES[0])), (X,)),
    "bias then view": (
        lambda x: torch.relu((x.view(-1, 64) @ W[0] + BIASES[0]).view(2, 3, 64)),
        (X3,),
    ),
    "gated": (GATES["silu"], (X3,)),
    "siblings": (lambda x: tuple(F.linear(x, w) + BIASES[0] for w in W), (X,)),
    "chain": (lambda x, y: F.linear(x, W[0]) + F.linear(y, W[1]) + y, (X, Y)),
}


@pytest.mark.parametrize(("forward", "args"), PROGRAMS.values(), ids=list(PROGRAMS))
def test_second_run_finds_nothing(forward: Callable[..., object], args: tuple[Tensor, ...]) -> None:
    run = run_passes(forward, *args)
    before = str(run.state.graph)
    assert run.counts["fuse"] > 0
    assert fuse(run.state) == 0
    assert str(run.state.graph) == before
