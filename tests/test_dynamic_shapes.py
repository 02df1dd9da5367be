"""Batch and sequence lengths change: the number of compilations stays small and results right."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqcompile
from tests.helpers import Mlp, assert_close, finequant, frozen, oracle


class Attention(nn.Module):
    """q, k and v from one input, attention, output: the sequence length is in several places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(128, 128) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (4, 32)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        return x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


SHAPES = [(2, 5), (2, 6), (3, 6), (4, 9), (1, 9), (4, 1), (1, 1), (7, 3), (2, 33), (5, 17)]


def _run_all(compiled: Any, model: nn.Module) -> None:
    plan = None
    for batch, length in SHAPES:
        x = torch.randn(batch, length, 128)
        actual = compiled(x)
        plan = plan or oracle(model)
        assert_close(actual, plan(x), depth=3, what=f"batch {batch}, length {length}")


@pytest.mark.parametrize(
    ("dynamic", "allowed", "inner_backend"),
    # None: the first call's sizes, then one graph per size that turned dynamic (batch, length) and
    # per size of one that PyTorch specializes. True: dynamic from the first call on, but for ones.
    [
        (None, 6, "eager"),
        pytest.param(None, 6, "aot_eager", marks=pytest.mark.slow),
        (True, 4, "eager"),
        pytest.param(True, 4, "inductor", marks=pytest.mark.slow),
    ],
)
def test_lengths_change_without_unbounded_recompiles(
    dynamic: bool | None, allowed: int, inner_backend: str
) -> None:
    model = frozen(Attention())
    _run_all(finequant(model, dynamic=dynamic, inner_backend=inner_backend), model)
    assert len(fqcompile.reports()) <= allowed
    compiled_before = len(fqcompile.reports())
    torch.manual_seed(1)
    _run_all(finequant(model, dynamic=dynamic, inner_backend=inner_backend), model)
    assert len(fqcompile.reports()) == compiled_before


def test_dynamic_compiles_once_for_all_lengths_above_one() -> None:
    model = frozen(Mlp())
    compiled = finequant(model, dynamic=True)
    for rows in (2, 3, 8, 64, 100):
        x = torch.randn(rows, 128)
        assert_close(compiled(x), oracle(model)(x), k=256, depth=2)
    assert len(fqcompile.reports()) == 1


@pytest.mark.slow
def test_dynamic_adds_no_guard_beyond_those_of_eager() -> None:
    """As many graphs as torch.compile makes of the same calls without us."""
    model = frozen(Attention())
    _run_all(finequant(model), model)
    ours = len(fqcompile.reports())
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    plain = torch.compile(model, backend=counter, fullgraph=True)
    for batch, length in SHAPES:
        plain(torch.randn(batch, length, 128))
    assert ours == counter.frame_count


@pytest.mark.parametrize(
    "inner_backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_rows_and_one_row(dtype: torch.dtype, dynamic: bool | None, inner_backend: str) -> None:
    model = frozen(Mlp()).to(dtype)
    compiled = finequant(model, dynamic=dynamic, inner_backend=inner_backend)
    expected: nn.Module | None = None
    for shape in ((0, 128), (1, 128), (3, 128), (128,)):
        x = torch.randn(shape, dtype=dtype)
        actual = compiled(x)
        expected = expected or oracle(model)
        assert_close(actual, expected(x), k=256, depth=2, what=str(shape))
    assert all(report.plan.quantized for report in fqcompile.reports())


def test_no_rows_in_a_gradient() -> None:
    model = frozen(Mlp())
    x = torch.randn(0, 128, requires_grad=True)
    finequant(model)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 128)
