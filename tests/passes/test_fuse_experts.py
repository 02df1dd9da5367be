"""fuse around experts, and gated units over the halves of one projection, dense or of experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines the operator)
from torch import Tensor

from fqcompile.passes.expert_bias import is_even_routing
from fqcompile.passes.op_nodes import argument
from tests.passes.graphs import Run, assert_same, run_passes

E, N, K, P = 4, 24, 40, 6
GENERATOR = torch.Generator().manual_seed(3)
STACK = torch.randn(E, 2 * N, K, generator=GENERATOR) / K**0.5
MATRIX = torch.randn(2 * N, K, generator=GENERATOR) / K**0.5
BIAS = torch.randn(E, 2 * N, generator=GENERATOR)
ROW = torch.randn(2 * N, generator=GENERATOR)
IDS, X = torch.tensor([3, 0, 3, 1, 0, 2]), torch.randn(P, K)
CAPACITY = torch.randn(E, 3, K)


def gathered(x: Tensor, ids: Tensor, stack: Tensor = STACK) -> Tensor:
    return torch.bmm(stack[ids], x.unsqueeze(-1)).squeeze(-1)


def oai(
    gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0, offset: int = 1
) -> Tensor:
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + offset) * (gate * torch.sigmoid(gate * alpha))


def fused(run: Run, **expected: Any) -> None:
    """One op is left, with these arguments, and it computes the same."""
    (op,) = run.linears
    got = {name: argument(op, name) for name in expected}
    if "bias" in expected:
        got["bias"] = got["bias"] is not None
    assert got == expected
    assert_same(run)


HALVES: dict[str, tuple[Callable[[Tensor], Tensor], str, bool]] = {
    "chunk": (lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1], "silu", False),
    "one chunk": (lambda y: (lambda g, u: u * F.gelu(g))(*y.chunk(2, dim=-1)), "gelu", False),
    "split": (lambda y: (lambda g, u: F.relu(g) * u)(*y.split(N, dim=1)), "relu", False),
    "slices": (lambda y: F.silu(y[..., :N]) * y[..., N:], "silu", False),
    "full slices": (lambda y: F.silu(y[:, :N]) * y[:, N : 2 * N], "silu", False),
    "narrow": (lambda y: F.silu(y.narrow(1, 0, N)) * y.narrow(-1, N, N), "silu", False),
    "gelu tanh": (
        lambda y: F.gelu(y[..., :N], approximate="tanh") * y[..., N:],
        "gelu_tanh",
        False,
    ),
    "every other": (lambda y: F.silu(y[..., ::2]) * y[..., 1::2], "silu", True),
    "GPT-OSS": (lambda y: oai(y[..., ::2], y[..., 1::2]), "swiglu_oai", True),
    "GPT-OSS, side by side": (lambda y: oai(*y.chunk(2, -1)), "swiglu_oai", False),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", HALVES)
def test_halves_of_experts_become_one_gated_op(name: str, bias: bool) -> None:
    unit, activation, interleaved = HALVES[name]
    end = BIAS if bias else None

    def forward(x: Tensor, i: Tensor) -> Tensor:
        y = gathered(x, i)
        return unit(y if end is None else y + end[i])

    run = run_passes(forward, X, IDS, granularity=16)
    assert run.state.packed[run.linears[0]].interleaved == interleaved
    fused(run, activation=activation, gated=True, n=N, bias=bias)


@pytest.mark.parametrize("name", HALVES)
def test_halves_of_a_dense_projection_become_one_gated_op(name: str) -> None:
    unit, activation, _ = HALVES[name]
    run = run_passes(lambda x: unit(F.linear(x, MATRIX, ROW)), X, granularity=16)
    fused(run, activation=activation, gated=True, n=N, bias=True)


def test_halves_of_capacity_dispatched_experts() -> None:
    """Llama 4: the unit acts on [E, C, 2N]; the op has the rows, and one reshape follows."""

    def forward(x: Tensor) -> Tensor:
        gate, up = torch.bmm(x, STACK.mT).chunk(2, dim=-1)
        return up * F.silu(gate)

    run = run_passes(forward, CAPACITY, granularity=16)
    assert run.ops["reshape"] == 2 and run.ops["chunk"] == 0
    fused(run, activation="silu", gated=True, n=N)


HALF_MISSES: dict[str, Callable[[Tensor], Any]] = {
    "gate second": lambda y: y[..., :N] * F.silu(y[..., N:]),
    "gate read elsewhere": lambda y: (F.silu(y[..., :N]) * y[..., N:], y[..., :N] + 1),
    "sum read elsewhere": lambda y: (F.silu(y[..., :N]) * y[..., N:], y + 1),
    "activation read elsewhere": lambda y: (lambda a: (a * y[..., N:], a + 1))(F.silu(y[..., :N])),
    "overlapping": lambda y: F.silu(y[..., :N]) * y[..., N - 1 : -1],
    "mixed halves": lambda y: F.silu(y[..., ::2]) * y[..., N:],
    "uneven": lambda y: (lambda g, u: F.silu(g[:, :4]) * u[:, :4])(*y.split([N + 4, N - 4], -1)),
    "three chunks": lambda y: F.silu(y.chunk(3, -1)[0]) * y.chunk(3, -1)[1],
    "rows": lambda y: F.silu(y.chunk(2, 0)[0]) * y.chunk(2, 0)[1],
    "no activation": lambda y: y[..., :N] * y[..., N:],
    "another steepness": lambda y: oai(*y.chunk(2, -1), alpha=1.5),
    "another limit": lambda y: oai(*y.chunk(2, -1), limit=6.0),
    "another offset": lambda y: oai(*y.chunk(2, -1), offset=2),
    "up not clamped": lambda y: (y[..., N:] + 1) * oai(y[..., :N], torch.zeros(N)),
}


@pytest.mark.parametrize("name", HALF_MISSES)
def test_near_miss_of_a_gated_unit_stays(name: str) -> None:
    run = run_passes(lambda x, i: HALF_MISSES[name](gathered(x, i)), X, IDS, granularity=16)
    assert not any(argument(op, "gated") for op in run.linears)
    assert_same(run)


def sorted_by_expert(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(sorted ids, offsets) as Hugging Face computes them on a CPU."""
    in_order, _ = torch.sort(ids)
    return in_order, counted(in_order)


def counted(ids: Tensor, low: int = 0) -> Tensor:
    counts = torch.histc(ids.float(), bins=E, min=low, max=E - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def grouped(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, STACK.mT, offs=offsets)


def test_bias_of_grouped_experts_in_place() -> None:
    def forward(x: Tensor, ids: Tensor) -> Tensor:
        in_order, offsets = sorted_by_expert(ids)
        y = grouped(x, offsets)
        y.add_(BIAS[in_order])
        return y.relu()

    run = run_passes(forward, X, IDS, granularity=16)
    assert not {"add_", "relu", "add"} & set(run.ops)
    fused(run, bias=True, activation="relu")


def test_bias_of_gathered_experts_in_two_dimensions() -> None:
    ids = IDS.view(3, 2)

    def forward(x: Tensor, i: Tensor) -> Tensor:
        return (torch.einsum("ti,taoi->tao", x, STACK[i]) + BIAS[i]).relu()

    fused(run_passes(forward, X[:3], ids, granularity=16), bias=True, activation="relu")


def test_bias_of_capacity_dispatched_experts() -> None:
    run = run_passes(
        lambda x: (torch.matmul(x, STACK.mT) + BIAS.unsqueeze(1)).relu(), CAPACITY, granularity=16
    )
    fused(run, bias=True, activation="relu")


def changed_ids(x: Tensor, ids: Tensor) -> Tensor:
    y = gathered(x, ids)
    ids.clamp_(max=1)
    return y + BIAS[ids]


BIAS_MISSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "bias of other ids": lambda x, i: gathered(x, i) + BIAS[i.flip(0)],
    "ids not sorted": lambda x, i: grouped(x, sorted_by_expert(i)[1]) + BIAS[i],
    "counted but not sorted": lambda x, i: grouped(x, counted(i)) + BIAS[i],
    "sorted the other way": lambda x, i: (lambda o: grouped(x, counted(o)) + BIAS[o])(
        torch.sort(i, descending=True)[0]
    ),
    "sorted the other way, by position": lambda x, i: (lambda o: grouped(x, counted(o)) + BIAS[o])(
        torch.sort(i, 0, True)[0]
    ),
    "counted in other bins": lambda x, i: (lambda o: grouped(x, counted(o, -1)) + BIAS[o])(
        sorted_by_expert(i)[0]
    ),
    "offsets of other ids": lambda x, i: (
        grouped(x, sorted_by_expert(i)[1]) + BIAS[sorted_by_expert(i + 0)[0]]
    ),
    "descending": lambda x, i: (
        grouped(x, sorted_by_expert(i)[1]) + BIAS[torch.sort(i, descending=True)[0]]
    ),
    "one bias for all": lambda x, i: gathered(x, i) + ROW,
    "a residual": lambda x, i: gathered(x, i) + x.repeat(1, 2)[:, : 2 * N],
    "read before the bias is added": lambda x, i: (lambda y: (y.sin(), y.add_(BIAS[i])))(
        gathered(x, i)
    ),
    "ids changed in between": lambda x, i: changed_ids(x, i.clone()),
}


@pytest.mark.parametrize("name", BIAS_MISSES)
def test_near_miss_of_an_expert_bias_stays(name: str) -> None:
    run = run_passes(lambda x, i: BIAS_MISSES[name](x, i), X, IDS, granularity=16)
    assert all(argument(op, "bias") is None for op in run.linears)
    assert_same(run)


def test_offsets_that_leave_the_first_expert_out_are_no_even_routing() -> None:
    """arange(0, E) * C looks like it, and gives the rows to the experts from the second on."""

    def forward(x: Tensor) -> Tensor:
        y = grouped(x, torch.arange(0, E, dtype=torch.int32) * 2)
        return y[: 2 * E - 2].view(E - 1, 2, -1) + BIAS[1:, None]

    run = run_passes(forward, torch.randn(2 * E, K), granularity=16)
    (op,) = run.linears
    assert not is_even_routing(op, E)
    assert argument(op, "bias") is None


def test_clamped_ids_keep_their_own_bias() -> None:
    """Expert parallelism clamps the sorted ids in place after counting them."""

    def forward(x: Tensor, ids: Tensor) -> Tensor:
        in_order, offsets = sorted_by_expert(ids)
        in_order.clamp_(max=E - 1)
        return grouped(x, offsets) + BIAS[in_order]

    run = run_passes(forward, X, IDS, granularity=16)
    assert all(argument(op, "bias") is None for op in run.linears)
    assert_same(run)


def test_gate_and_up_of_their_own_stacks_are_one_op_in_the_end() -> None:
    gate_w, up_w = STACK[:, :N], STACK[:, N:].clone()

    def forward(x: Tensor, i: Tensor) -> Tensor:
        return F.silu(gathered(x, i, gate_w) + BIAS[i, :N]) * gathered(x, i, up_w)

    run = run_passes(lambda x, i: F.silu(gathered(x, i, gate_w)) * gathered(x, i, up_w), X, IDS)
    (op,) = run.linears
    assert len(run.state.packed[op].parts) == 2
    fused(run, activation="silu", gated=True, n=N)


def test_gate_and_up_of_capacity_dispatched_experts_are_one_op() -> None:
    """Both have the same offsets, which are made once."""
    gate_w, up_w = STACK[:, :N], STACK[:, N:].clone()
    run = run_passes(lambda x: F.silu(x @ gate_w.mT) * torch.bmm(x, up_w.mT), CAPACITY)
    assert run.ops["arange"] == 1
    fused(run, activation="silu", gated=True, n=N)


def test_siblings_with_one_routing_are_stacked_per_expert() -> None:
    other = torch.randn(E, 9, K, generator=GENERATOR)
    run = run_passes(lambda x, i: (gathered(x, i), gathered(x, i, other)), X, IDS, granularity=16)
    fused(run, n=2 * N + 9)


def test_experts_of_other_ids_are_not_siblings() -> None:
    run = run_passes(lambda x, i: (gathered(x, i), gathered(x, i.flip(0))), X, IDS)
    assert len(run.linears) == 2
    assert_same(run)


def test_where_x_needs_a_gradient_activations_stay_outside() -> None:
    x = X.clone().requires_grad_()
    run = run_passes(
        lambda x, i: HALVES["chunk"][0](gathered(x, i) + BIAS[i]), x, IDS, grad=True, granularity=16
    )
    (op,) = run.linears
    assert (argument(op, "gated"), argument(op, "bias") is not None) == (False, True)
    assert_same(run)


def test_writing_between_projection_and_unit_stops_the_fusion() -> None:
    other = torch.zeros(3)

    def forward(x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gathered(x, i).chunk(2, -1)
        other.add_(1)
        return F.silu(gate) * up, other

    run = run_passes(forward, X, IDS, granularity=16)
    assert not any(argument(op, "gated") for op in run.linears)
