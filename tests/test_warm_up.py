"""warm_up: afterwards a call of that kind compiles nothing. gemm_specs: what there is to tune."""

import torch
from torch import nn

import fqcompile
from fqcompile.compiled import warm_up
from fqcompile.explain import gemm_specs
from fqcompile.kernels.registry import EVERY_STEP
from tests.helpers import Mlp, finequant, frozen, report

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def test_after_warming_up_nothing_is_compiled() -> None:
    compiled = finequant(frozen(Mlp()))
    found = warm_up(compiled, X)
    assert found == fqcompile.reports()
    assert len(report().plan.quantized) == 2
    with torch.no_grad():
        compiled(X)
    assert fqcompile.reports() == found
    assert warm_up(compiled, X) == []


def test_weights_that_require_grad_are_quantized_as_calls_without_grad_will() -> None:
    compiled = finequant(Mlp())
    warm_up(compiled, X)
    assert len(report().plan.quantized) == 2
    with torch.no_grad():
        compiled(X)
    assert len(fqcompile.reports()) == 1
    (found,) = warm_up(compiled, X, grad=True)
    assert not found.plan.quantized
    compiled(X)
    assert len(fqcompile.reports()) == 2


def test_each_kind_of_call_is_warmed_up_by_itself() -> None:
    model = frozen(Mlp())
    compiled = finequant(lambda x, *, scale: model(x) * scale, dynamic=False)
    first = warm_up(compiled, X, scale=2.0)
    second = warm_up(compiled, X[:3], scale=2.0)
    assert fqcompile.reports() == [*first, *second]
    assert len(first) == len(second) == 1


def test_kernels_of_all_numbers_of_rows_are_built_in_its_calls_alone() -> None:
    seen: list[bool] = []
    assert warm_up(lambda: seen.append(bool(EVERY_STEP))) == []
    assert seen == [True]
    assert not EVERY_STEP


class Blocks(nn.Module):
    """Two layers of one shape, one of them with a residual, and a gated pair."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.up = (nn.Linear(128, 128, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x)) + x
        return nn.functional.silu(self.gate(x)) * self.up(x)


def test_gemm_specs_are_those_after_fusion() -> None:
    model = frozen(Blocks())
    with torch.no_grad():
        found = gemm_specs(model, X, bits=8, granularity=64, min_elements=1)
    assert sorted(
        (s.n, s.k, s.m, s.bits, s.group_size, s.gated, s.has_residual) for s in found
    ) == [
        (128, 128, 5, 8, 64, False, False),
        (128, 128, 5, 8, 64, False, True),
        (128, 128, 5, 8, 64, True, False),
    ]
    assert not fqcompile.reports()
