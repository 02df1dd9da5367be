"""Stacks of experts: each expert as it would be alone, at the finest group size any asks for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.quant.choose import choose_and_quantize, choose_plan, quantize_weight
from fqcompile.tensor.quantized import QuantizedTensor
from tests.quant.strategies import KINDS, matrix

FP16 = torch.float16


def outlier_stack(experts: int = 4, n: int = 16, k: int = 256, bad: int = 2) -> Tensor:
    """Experts that are fine per column, and one whose outliers want small groups."""
    w = torch.randn(experts, n, k, generator=torch.Generator().manual_seed(0))
    w[bad, :, ::64] *= 50
    return w


def worst_expert(w: Tensor, weight: QuantizedTensor) -> list[float]:
    """‖w - ŵ‖ / ‖w‖ of each expert, from the dequantized stack alone."""
    w_hat = weight.dequantize(torch.float32).double()
    norms = [t.flatten(1).norm(dim=1) for t in (w.double() - w_hat, w.double())]
    return (norms[0] / norms[1].clamp(min=1e-300)).tolist()


@pytest.mark.parametrize("granularity", ["adaptive", "range"])
def test_stack_gets_the_finest_group_size_that_an_expert_asks_for(granularity: str) -> None:
    w, options = outlier_stack(), SiteOptions(granularity=granularity)
    alone = [choose_plan(expert, options, FP16).group_size for expert in w]
    assert len(set(alone)) > 1, "the experts agree, so nothing is decided"
    assert choose_plan(w, options, FP16).group_size == min(alone)


@given(
    st.lists(st.sampled_from([k for k in KINDS if k != "zero rows"]), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from([1, 20, 33, 64]),
    st.sampled_from(["column", "adaptive", "range", 1]),
    st.sampled_from([4, 8]),
)
def test_experts_are_quantized_as_each_would_be_alone(
    kinds: list[str], n: int, k: int, granularity: str | int, bits: int
) -> None:
    w = torch.stack([matrix(kind, n, k, seed) for seed, kind in enumerate(kinds)])
    plan, weight = choose_and_quantize(w, SiteOptions(granularity=granularity, bits=bits), FP16)
    assert weight.shape == (len(kinds), n, k)
    for expert, (matrix_e, part) in enumerate(zip(w, weight.unbind(), strict=True)):
        alone = SiteOptions(granularity=plan.group_size, bits=bits)
        want = quantize_weight(matrix_e, choose_plan(matrix_e, alone, plan.scale_dtype))
        assert torch.equal(part.qweight, want.qweight), f"codes of expert {expert}"
        assert torch.equal(part.scale, want.scale), f"scales of expert {expert}"
    assert plan.expert_errors == pytest.approx(worst_expert(w, weight), rel=1e-5, abs=1e-12)
    again = quantize_weight(w, plan)
    assert torch.equal(again.qweight, weight.qweight) and torch.equal(again.scale, weight.scale)


def test_one_expert_beyond_16_bit_scales_makes_all_scales_fp32() -> None:
    w = torch.randn(3, 4, 32)
    w[1] *= 1e-9
    plan, weight = choose_and_quantize(w, SiteOptions(granularity=32), FP16)
    assert plan.scale_dtype == weight.scale.dtype == torch.float32
    assert max(plan.expert_errors) < 0.2


def test_transposed_stack_is_read_where_it_lies() -> None:
    w = torch.randn(3, 32, 16)
    options = SiteOptions(granularity=16)
    _, straight = choose_and_quantize(w.mT.contiguous(), options, FP16)
    _, viewed = choose_and_quantize(w.mT, options, FP16)
    assert torch.equal(straight.qweight, viewed.qweight)


def test_budget_bounds_the_worst_expert() -> None:
    w = outlier_stack()
    loose = choose_plan(w, SiteOptions(), FP16)
    budget = (loose.relative_error + loose.worst_error) / 2
    assert loose.relative_error < budget < loose.worst_error, "the whole is within, one is not"
    plan, weight = choose_and_quantize(w, SiteOptions(error_budget=budget), FP16)
    assert max(worst_expert(w, weight)) <= budget * (1 + 1e-9)
    assert (plan.bits, plan.group_size) != (loose.bits, loose.group_size)


def test_impossible_budget_names_the_worst_expert() -> None:
    with pytest.raises(UnquantizableWeight, match=r"^expert 2: error_budget 0.0001 cannot be met"):
        choose_plan(outlier_stack(), SiteOptions(error_budget=1e-4), FP16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_expert_is_named(value: float) -> None:
    w = torch.randn(5, 8, 32)
    w[3, 1, 2] = value
    with pytest.raises(UnquantizableWeight, match=r"^expert 3: 1 of 256 values are NaN or inf"):
        choose_plan(w, SiteOptions(), FP16)
    with pytest.raises(UnquantizableWeight, match=r"^expert 3"):
        quantize_weight(w, choose_plan(w[:3], SiteOptions(), FP16))


def test_empty_stack_is_refused() -> None:
    with pytest.raises(UnquantizableWeight, match=r"shape is \(0, 4, 32\)"):
        choose_plan(torch.empty(0, 4, 32), SiteOptions(), FP16)


def test_gate_then_up_moves_rows_of_each_expert() -> None:
    _, weight = choose_and_quantize(torch.randn(2, 6, 32), SiteOptions(granularity=16), FP16)
    moved = weight.gate_then_up().dequantize(torch.float32)
    original = weight.dequantize(torch.float32)
    assert torch.equal(moved, torch.cat([original[:, ::2], original[:, 1::2]], 1))


def test_cat_of_stacks_stacks_the_rows_of_each_expert() -> None:
    options = SiteOptions(granularity=16)
    parts = [choose_and_quantize(torch.randn(3, n, 32), options, FP16)[1] for n in (2, 5)]
    whole = QuantizedTensor.cat(parts)
    views = [part.dequantize(torch.float32) for part in parts]
    assert whole.shape == (3, 7, 32)
    assert torch.equal(whole.dequantize(torch.float32), torch.cat(views, 1))
