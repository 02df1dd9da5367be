"""QuantizedTensor: values, sizes, lossless regrouping, concatenation."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fqcompile.config import SiteOptions
from fqcompile.quant.choose import choose_plan, quantize_weight
from fqcompile.tensor.quantized import QuantizedTensor
from tests.quant.strategies import matrices, matrix


def quantized(w, bits=4, granularity="column", scale_dtype=torch.float16):
    options = SiteOptions(bits=bits, granularity=granularity)
    return quantize_weight(w, choose_plan(w, options, scale_dtype))


@given(matrices(max_k=150), st.sampled_from([4, 8]), st.data())
def test_regroup_is_lossless(w, bits, data):
    k = w.shape[1]
    coarse = data.draw(st.sampled_from(["column", 64, 48, 32]), label="coarse")
    assume(coarse == "column" or coarse <= k)
    weight = quantized(w, bits, coarse)
    fine = data.draw(st.sampled_from([1, 2, 3, 5, 8, 16, 32, 64]), label="fine")
    assume(weight.group_size % fine == 0 or weight.group_size == k)
    regrouped = weight.regroup(fine)
    assert regrouped.scale.shape == (w.shape[0], -(-k // regrouped.group_size))
    assert regrouped.group_size == min(fine, k)
    expected = weight.dequantize(torch.float32)
    assert torch.equal(regrouped.dequantize(torch.float32), expected)


def test_regroup_refuses_what_would_lose():
    weight = quantized(matrix("gaussian", 2, 128), granularity=64)
    for size in (48, 128, 0):
        with pytest.raises(ValueError, match=rf"group_size {size} .*64.*K = 128"):
            weight.regroup(size)
    assert weight.regroup(64) is weight


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([4, 8]))
def test_cat_stacks_rows(counts, bits):
    parts = [matrix("heavy", n, 50, seed) for seed, n in enumerate(counts)]
    weights = [quantized(w, bits, 32) for w in parts]
    whole = QuantizedTensor.cat(weights)
    assert whole.shape == (sum(counts), 50)
    expected = torch.cat([w.dequantize(torch.float32) for w in weights])
    assert torch.equal(whole.dequantize(torch.float32), expected)


def test_cat_of_float16_and_float32_scales_loses_nothing():
    weights = [quantized(matrix(kind, 2, 64)) for kind in ("gaussian", "tiny")]
    assert [w.scale.dtype for w in weights] == [torch.float16, torch.float32]
    expected = torch.cat([w.dequantize(torch.float32) for w in weights])
    assert torch.equal(QuantizedTensor.cat(weights).dequantize(torch.float32), expected)


def test_cat_refuses_unequal_layouts():
    w = matrix("gaussian", 2, 64)
    with pytest.raises(ValueError, match="regroup"):
        QuantizedTensor.cat([quantized(w), quantized(w, granularity=32)])
    with pytest.raises(ValueError, match="at least one"):
        QuantizedTensor.cat([])


@pytest.mark.parametrize(("bits", "k", "expected"), [(4, 100, 50 + 8), (8, 100, 100 + 8)])
def test_nbytes_counts_codes_and_scales(bits, k, expected):
    assert quantized(matrix("gaussian", 3, k), bits, 32).nbytes == 3 * expected


def test_everything_it_makes_in_inference_mode_is_ordinary():
    w = matrix("gaussian", 4, 64)
    with torch.inference_mode():
        weight = quantized(w)
        made = [weight, weight.regroup(32), QuantizedTensor.cat([weight, weight])]
        values = weight.dequantize(torch.bfloat16)
    tensors = [values, *(t for m in made for t in (m.qweight, m.scale))]
    assert not any(t.is_inference() or t.requires_grad for t in tensors)
