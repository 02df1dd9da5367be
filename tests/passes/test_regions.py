"""Weights beside and inside the regions of a graph: transforms and higher-order operators."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fqcompile.passes.effects import in_transforms
from tests.passes.graphs import Run, assert_same, run_passes, weight

A, B, C = (weight(64, 64, i) for i in range(3))
BIAS = torch.randn(64)
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
BODY = "the bodies of higher-order operators stay as they are"


def kept(run: Run) -> dict[str, str]:
    return {weight.name: weight.reason for weight in run.state.kept}


def double(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: 2 * row)(x)


def nested(x: Tensor) -> Tensor:
    return torch.vmap(torch.vmap(lambda value: 2 * value))(x)


def gradient(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: (y**2).sum())(x)


def forward_mode(x: Tensor) -> Tensor:
    return torch.func.jvp(torch.sin, (x,), (x,))[1]


@pytest.mark.parametrize("transform", [double, nested, gradient, forward_mode])
def test_only_what_lies_inside_a_transform_is_refused(
    transform: Callable[[Tensor], Tensor],
) -> None:
    def forward(x: Tensor) -> Tensor:
        return F.linear(transform(F.linear(x, A, BIAS)), B)

    run = run_passes(forward, X)
    assert run.counts["rewrite"] == 2, kept(run)
    assert_same(run)


def test_weight_read_inside_a_transform_is_kept_and_the_one_after_it_is_not() -> None:
    def forward(x: Tensor) -> Tensor:
        return F.linear(torch.vmap(lambda row: F.linear(row, A))(x), B)

    run = run_passes(forward, X)
    assert run.counts["rewrite"] == 1
    assert kept(run) == {
        "A": "read inside a torch.func transform (vmap), where packed weights have no rule"
    }
    assert_same(run)


def test_nothing_is_fused_into_a_transform() -> None:
    """The sum stands where rows are single; its other term is computed before."""

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x[0], A)
        z = torch.vmap(lambda row: torch.relu(y) + row)(x)
        return z, F.linear(x, B)

    run = run_passes(forward, X)
    assert run.counts["rewrite"] == 2
    assert in_transforms(run.state.graph).keys().isdisjoint(run.linears)
    assert_same(run)


@torch.compiler.nested_compile_region
def region(x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, BIAS))


def nested_regions(x: Tensor) -> Tensor:
    return region(region(region(x, A), B), A)


def checkpointed(x: Tensor) -> Tensor:
    inner = checkpoint(lambda t: F.gelu(F.linear(t, A, BIAS)), x, use_reentrant=False)
    return checkpoint(lambda t: F.linear(t, B), inner, use_reentrant=False)


def checkpoint_of_a_region(x: Tensor) -> Tensor:
    return checkpoint(lambda t: region(region(t, A), B), x, use_reentrant=False)


@pytest.mark.parametrize("forward", [nested_regions, checkpointed, checkpoint_of_a_region])
def test_body_that_is_only_run_is_part_of_the_graph(forward: Callable[[Tensor], Tensor]) -> None:
    run = run_passes(forward, X)
    assert {site.name for site in run.state.sites if site.plan} == {"A", "B"}
    assert run.ops["gelu"] == 0, "it is fused as elsewhere"
    assert_same(run)


def test_nested_region_under_grad_is_part_of_the_graph() -> None:
    run = run_passes(nested_regions, X, grad=True)
    assert run.counts["rewrite"] == 3
    assert_same(run)


def test_checkpoint_that_a_backward_needs_stays() -> None:
    run = run_passes(checkpointed, X, grad=True)
    assert run.ops["tag_activation_checkpoint"] == 2
    assert kept(run) == dict.fromkeys(("A", "B"), f"read inside tag_activation_checkpoint: {BODY}")
    assert "torch.no_grad()" in run.state.warnings[0]
    assert_same(run)


def test_branches_are_named_and_what_is_outside_is_quantized() -> None:
    def forward(x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda t: F.linear(t, A), lambda t: F.linear(t, B), (x,))
        return F.linear(y, C)

    run = run_passes(forward, X)
    assert run.counts["rewrite"] == 1
    assert kept(run) == dict.fromkeys(("A", "B"), f"read inside cond: {BODY}")
    assert "branch and loop in Python" in run.state.warnings[0]
    assert_same(run)
