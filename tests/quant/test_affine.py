"""w ≈ q * scale, checked in float64 NumPy: nearest codes, bounds, dtypes, named edge cases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.quant.affine import choose_scale, quantize_affine
from fqcompile.tensor.codes import dequantize_rows, pack
from fqcompile.tensor.format import INT4, INT8, QTYPES, UNIFORM, QType
from tests.quant.strategies import METHODS, SCALE_DTYPES, group_sizes, matrices, matrix, qtypes

methods = st.sampled_from(METHODS)
# In sixteenths.
NORMAL_LEVELS = [-127, -97, -76, -60, -46, -33, -21, -10, 0, 11, 23, 36, 50, 66, 87, 117]
scale_dtypes = st.sampled_from(SCALE_DTYPES)


def dequantized(
    codes: torch.Tensor, scale: torch.Tensor, qtype: QType, g: int, dtype: torch.dtype
) -> torch.Tensor:
    return dequantize_rows(pack(codes, qtype), scale, qtype, g, codes.shape[1], dtype)


def levels_of(qtype: QType) -> np.ndarray:
    """Of codes from the smallest on."""
    if qtype.levels == "normal":
        return np.array(NORMAL_LEVELS) / 16
    return np.arange(-(2.0 ** (qtype.bits - 1)), 2 ** (qtype.bits - 1))


def spread(scale: torch.Tensor, g: int, k: int) -> np.ndarray:
    """The scale of each weight, [N, K] in float64."""
    return np.repeat(scale.double().numpy(), g, axis=1)[:, :k]


@given(matrices(), qtypes, group_sizes, methods, scale_dtypes)
def test_codes_are_nearest_and_errors_bounded_by_the_scale(w, qtype, g, method, scale_dtype):
    scale = choose_scale(w, qtype, g, method, scale_dtype)
    codes = quantize_affine(w, scale, qtype, g)
    assert codes.dtype == torch.int8 and codes.shape == w.shape
    assert scale.dtype in (scale_dtype, torch.float32)
    assert scale.isfinite().all() and (scale != 0).all()
    exact, s = w.float().double().numpy(), spread(scale, g, w.shape[1])
    levels, index = levels_of(qtype), codes.numpy().astype(int) + 2 ** (qtype.bits - 1)
    error = np.abs(exact - levels[index] * s)
    nearest = np.abs(exact[..., None] - levels * s[..., None]).min(-1)
    # The quotient is rounded in float32: an error of |level| 2^-24 <= 2^-17 of a step.
    slack = np.abs(s) * 2.0**-17
    assert (error <= nearest + slack).all()
    # Half the wider gap beside the level, and beyond the outermost ones what is clipped.
    gaps = np.diff(levels)
    beside = np.maximum(np.append(gaps, 0)[index], np.insert(gaps, 0, 0)[index])
    low, high = np.sort([levels[0] * s, levels[-1] * s], axis=0)
    clipped = np.maximum(np.maximum(exact - high, low - exact), 0)
    assert (error <= np.abs(s) * beside / 2 + clipped + slack).all()


@given(matrices(), qtypes, group_sizes, scale_dtypes)
def test_absmax_clips_nothing_by_more_than_the_rounding_of_its_scale(w, qtype, g, scale_dtype):
    scale = choose_scale(w, qtype, g, "absmax", scale_dtype)
    ratio = np.abs(w.float().double().numpy() / spread(scale, g, w.shape[1]))
    # Half a unit in the last place: 2^-9 in bfloat16, the coarsest.
    assert ratio.max() <= levels_of(qtype)[-1] * (1 + 2.0**-8)


@given(matrices(), group_sizes)
def test_refining_absmax_groups_never_raises_the_bound(w, g):
    coarse = choose_scale(w, INT4, 2 * g, "absmax", torch.float32)
    fine = choose_scale(w, INT4, g, "absmax", torch.float32)
    k = w.shape[1]
    zero = np.repeat(w.float().abs().numpy(), 1, axis=1).max(1) == 0
    held = spread(fine, g, k) <= spread(coarse, 2 * g, k)
    # Groups of zeros have scale 1 by definition, and no error.
    zeros = spread(fine, g, k) == 1
    assert (held | zeros | zero[:, None]).all()


@given(matrices(), qtypes, group_sizes, methods)
def test_layout_of_the_weight_does_not_matter(w, qtype, g, method):
    results = []
    for same in (w, w.contiguous(), w.t().contiguous().t()):
        scale = choose_scale(same, qtype, g, method, torch.float16)
        results.append((scale, quantize_affine(same, scale, qtype, g)))
    for scale, codes in results[1:]:
        assert torch.equal(scale, results[0][0]) and torch.equal(codes, results[0][1])


@given(st.data(), qtypes, group_sizes, st.integers(1, 4), st.integers(1, 70))
def test_levels_times_the_scale_survive_exactly(data, qtype, g, n, k):
    values = st.lists(st.integers(qtype.qmin, qtype.qmax), min_size=n * k, max_size=n * k)
    codes = torch.tensor(data.draw(values, label="codes"), dtype=torch.int8).view(n, k)
    # Powers of two: products with levels are exact in every type.
    exponents = st.lists(st.integers(-9, 6), min_size=n * -(-k // g), max_size=n * -(-k // g))
    exponent = torch.tensor(data.draw(exponents, label="exponents"), dtype=torch.float32)
    scale = torch.exp2(exponent).view(n, -1)
    levels = torch.from_numpy(levels_of(qtype)).float()[codes.long() - qtype.qmin]
    w = levels * torch.from_numpy(spread(scale, g, k)).float()
    assert torch.equal(quantize_affine(w, scale, qtype, g), codes)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(dequantized(codes, scale, qtype, g, dtype).double(), w.double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8])
def test_full_range_integers_get_scale_one(bits, method):
    qtype = QTYPES[bits, UNIFORM]
    low, high = -(2 ** (bits - 1)) + (method == "absmax"), 2 ** (bits - 1) - 1
    w = torch.arange(low, high + 1).float().repeat(3, 2)
    scale = choose_scale(w, qtype, w.shape[1], method, torch.float16)
    codes = quantize_affine(w, scale, qtype, w.shape[1])
    assert torch.equal(dequantized(codes, scale, qtype, w.shape[1], torch.float32), w)


@given(matrices(), qtypes, group_sizes, scale_dtypes, st.sampled_from(SCALE_DTYPES))
def test_dequantized_value_is_the_product_rounded_once(w, qtype, g, scale_dtype, dtype):
    scale = choose_scale(w, qtype, g, "mse", scale_dtype)
    codes = quantize_affine(w, scale, qtype, g)
    k = w.shape[1]
    levels = levels_of(qtype)[codes.numpy().astype(int) + 2 ** (qtype.bits - 1)]
    product = torch.from_numpy(levels * spread(scale, g, k))
    # A product of 8 and 24 bits is rounded to float32 before a narrower type: hence .float().
    expected = product.float().to(dtype)
    assert torch.equal(dequantized(codes, scale, qtype, g, dtype), expected)


def test_chunk_borders_do_not_show():
    w = matrix("heavy", 300, 2050)
    scale = choose_scale(w, INT4, 64, "mse", torch.float16)
    for row in (0, 62, 63, 64, 127, 128, 299):
        alone = choose_scale(w[row : row + 1], INT4, 64, "mse", torch.float16)
        # Sums of 64 terms may be added in another order: one unit in the last place of float16.
        torch.testing.assert_close(scale[row : row + 1], alone, rtol=2.0**-10, atol=0)
    codes = quantize_affine(w, scale, INT4, 64)
    values = dequantized(codes, scale, INT4, 64, torch.float32)
    assert torch.equal(values, (codes * torch.from_numpy(spread(scale, 64, 2050))).float())


@pytest.mark.parametrize("method", METHODS)
class TestEdges:
    """Defined results where a careless formula divides by zero or overflows."""

    def values(self, w, method, qtype=INT4, g=32, scale_dtype=torch.float16):
        scale = choose_scale(w, qtype, g, method, scale_dtype)
        codes = quantize_affine(w, scale, qtype, g)
        values = dequantized(codes, scale, qtype, g, torch.float32)
        assert scale.isfinite().all() and values.isfinite().all()
        return scale, codes, values

    def test_zero_groups_have_scale_one_and_codes_zero(self, method):
        w = matrix("gaussian", 2, 64)
        w[0, :32] = 0
        scale, codes, _ = self.values(w, method)
        assert scale.dtype == torch.float16 and scale[0, 0] == 1 and (scale != 1).sum() == 3
        assert (codes[0, :32] == 0).all() and (codes[0, 32:] != 0).any()

    def test_all_equal_groups_are_met_within_the_rounding_of_the_scale(self, method):
        w = torch.tensor([[0.3], [-0.7]]).expand(2, 64)
        _, _, values = self.values(w, method)
        torch.testing.assert_close(values, w.contiguous(), rtol=2.0**-11, atol=0)

    def test_one_huge_outlier_keeps_its_value_and_harms_its_group_alone(self, method):
        w = matrix("gaussian", 1, 64)
        w[0, 3] = 5e4
        _, _, values = self.values(w, method)
        assert values[0, 3].item() == pytest.approx(5e4, rel=2.0**-11)
        clean = self.values(w[:, 32:], method)[2]
        assert torch.equal(values[:, 32:], clean)

    def test_denormals_are_bounded_by_a_normal_scale(self, method):
        w = torch.tensor([[1e-45, -3e-45, 1e-39, 0.0]])
        scale, _, values = self.values(w, method)
        assert scale.dtype == torch.float32
        assert (scale.abs() >= torch.finfo(torch.float32).tiny).all()
        assert ((w - values).abs() <= scale.abs() / 2).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
    @pytest.mark.parametrize("qtype", QTYPES.values(), ids=lambda qtype: qtype.name)
    def test_largest_numbers_do_not_overflow(self, method, dtype, scale_dtype, qtype):
        w = torch.full((2, 40), torch.finfo(dtype).max, dtype=dtype)
        w[0, ::2] *= -1
        w[1, 1:] /= 3
        scale, codes, values = self.values(w, method, qtype, scale_dtype=scale_dtype)
        assert dequantized(codes, scale, qtype, 32, dtype).isfinite().all()
        assert (values.sign() == w.float().sign()).all()

    @pytest.mark.parametrize("magnitude", [1e-6, 1e5, 1e7])
    def test_scales_outside_float16_are_all_kept_in_float32(self, method, magnitude):
        """With 1e5 the scale fits float16, but not 8 times it, and so not every value."""
        w = matrix("gaussian", 4, 64)
        w[1, 32:] *= magnitude
        scale, _, values = self.values(w, method)
        assert scale.dtype == torch.float32
        group = slice(32, 64)
        assert (values - w)[1, group].norm() / w[1, group].norm() < 0.15
        assert self.values(w, method, scale_dtype=torch.bfloat16)[0].dtype == torch.bfloat16

    @pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (1, 33), (2, 7)])
    def test_tiny_and_odd_shapes(self, method, shape):
        w = matrix("gaussian", *shape)
        scale, _, values = self.values(w, method, INT8)
        assert scale.shape == (shape[0], -(-shape[1] // 32))
        assert (values - w).abs().max() <= scale.abs().max() / 2 * (1 + 2.0**-8)


@pytest.mark.parametrize("inference", [True, False])
def test_results_are_ordinary_tensors_without_grad(inference):
    w = torch.nn.Parameter(matrix("gaussian", 4, 64))
    with torch.inference_mode(inference):
        scale = choose_scale(w, INT4, 32, "mse", torch.float16)
        codes = quantize_affine(w, scale, INT4, 32)
    assert not any(t.is_inference() or t.requires_grad for t in (scale, codes))
    assert w.requires_grad and w.grad is None


def test_the_weight_is_left_alone():
    w = matrix("heavy", 4, 70)
    before = w.clone()
    quantize_affine(w, choose_scale(w, INT4, 32, "mse", torch.float16), INT4, 32)
    assert torch.equal(w, before)
