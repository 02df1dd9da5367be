"""A weight that the graph changes before the matmul is not constant, however it is written."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqcompile
from tests.passes.graphs import weight

W, V = (nn.Parameter(weight(64, 64, i), requires_grad=False) for i in range(2))
X = torch.randn(4, 64)


def masked(x: Tensor) -> Tensor:
    w = W * (W > 0)
    w[0] = 100.0
    return x @ w


def computed(x: Tensor) -> Tensor:
    w = W * 2
    w.add_(1)
    return x @ w


def concatenated(x: Tensor) -> Tensor:
    w = torch.cat([W, V], 1)
    w.mul_(3)
    return x @ w


def stacked(x: Tensor) -> Tensor:
    w = torch.stack([W, V])
    w[0] *= 2
    return x @ w[0]


def through_data(x: Tensor) -> Tensor:
    W.data.mul_(2)
    return x @ W


def through_type_as(x: Tensor) -> Tensor:
    W.type_as(x).mul_(2)
    return x @ W


def through_moveaxis(x: Tensor) -> Tensor:
    torch.moveaxis(W, 0, 1).mul_(2)
    return x @ W


def through_an_overload(x: Tensor) -> Tensor:
    torch.ops.aten.view.default(W, [-1]).mul_(2)
    return x @ W


def by_dunder(x: Tensor) -> Tensor:
    return x @ W.__imul__(2)


WRITES = [
    masked,
    computed,
    concatenated,
    stacked,
    through_data,
    through_type_as,
    through_moveaxis,
    through_an_overload,
    by_dunder,
]


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_written_weight_gives_what_eager_gives(forward: Callable[[Tensor], Tensor]) -> None:
    original = W.detach().clone()
    with torch.no_grad():
        expected = forward(X)
        W.copy_(original)
        options = {"inner_backend": "eager", "min_elements": 1}
        y = torch.compile(forward, backend="finequant", options=options)(X)
        W.copy_(original)
    # Nothing may be quantized here, so the results are those of the same calls.
    assert torch.equal(y, expected)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return 3 * (a @ b)


torch.library.custom_op(
    "fqcompile_tests::mm", _mm, mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor"
)
torch.library.register_fake("fqcompile_tests::mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
torch.library.custom_op(
    "fqcompile_tests::silu", lambda a: 7 * a, mutates_args=(), schema="(Tensor a) -> Tensor"
)
torch.library.register_fake("fqcompile_tests::silu", torch.empty_like)


@torch.compiler.allow_in_graph
def relu(t: Tensor) -> Tensor:
    return t * 5


@pytest.mark.parametrize(
    ("forward", "sites"),
    [
        (lambda x: torch.ops.fqcompile_tests.mm(x, W), 0),
        (lambda x: torch.ops.fqcompile_tests.silu(x @ W), 1),
        (lambda x: relu(x @ W), 1),
        (lambda x: torch.func.grad(lambda t: F.relu(t @ W).sum())(x), 0),
        (lambda x: torch.func.jvp(lambda t: t @ W, (x,), (x,))[1], 0),
        (lambda x: x @ V[:, :1].expand(64, 32), 1),
    ],
    ids=["op named mm", "op named silu", "function named relu", "func.grad", "jvp", "expand"],
)
def test_what_only_looks_like_ours_keeps_its_meaning(
    forward: Callable[[Tensor], Tensor], sites: int
) -> None:
    options = {"inner_backend": "eager", "min_elements": 1, "bits": 8}
    with torch.no_grad():
        y = torch.compile(forward, backend="finequant", options=options)(X)
        expected = forward(X)
    assert fqcompile.reports()[-1].warnings == ()
    assert fqcompile.reports()[-1].plan.totals.quantized == sites
    # int8 moves a sum by at most s/2 a weight, s = max|w| / 127: far below one hundredth here.
    assert y.shape == expected.shape
    assert (y - expected).norm() <= 0.02 * expected.norm()


def test_graph_with_a_dead_weight_view_and_no_site_runs() -> None:
    def forward(x: Tensor) -> Tensor:
        W.t()
        return x + 1

    compiled = torch.compile(forward, backend="finequant", options={"inner_backend": "eager"})
    with torch.no_grad():
        assert torch.equal(compiled(X), X + 1)


def test_mv_keeps_its_dtype_under_autocast() -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.mv(W, x[0]) + 1

    options = {"inner_backend": "eager", "min_elements": 1}
    with torch.no_grad():
        assert torch.compile(forward, backend="finequant", options=options)(X).dtype == (
            forward(X).dtype
        )
