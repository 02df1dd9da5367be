"""Nearest codes against an exact search in NumPy: ties, borders of cells, order, NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.quant.affine import choose_scale, quantize_affine
from fqcompile.quant.rounding import _tables, nearest_codes, nearest_levels
from fqcompile.tensor.codes import dequantize_rows, pack
from fqcompile.tensor.format import INT4, NORMAL4, QTYPES
from tests.quant.strategies import METHODS, group_sizes, matrix, qtypes

# In sixteenths, of codes -8 to 7.
NORMAL_LEVELS = [-127, -97, -76, -60, -46, -33, -21, -10, 0, 11, 23, 36, 50, 66, 87, 117]


def nearest(v: np.ndarray) -> np.ndarray:
    """The index of the nearest level, of two the upper one, for multiples of 2**-20."""
    distance = np.abs(v[..., None] - np.array(NORMAL_LEVELS) / 16)
    return 15 - distance[..., ::-1].argmin(-1)


def test_every_border_of_a_cell_and_its_neighbors() -> None:
    borders = torch.arange(-9 * 64, 9 * 64 + 1) / 64
    v = torch.stack([borders - 2**-19, borders, borders + 2**-19])
    index = nearest(v.double().numpy())
    assert np.array_equal(nearest_codes(v.clone(), NORMAL4).numpy(), index - 8)
    levels = nearest_levels(v.clone(), NORMAL4)
    assert levels.dtype == torch.float32
    assert np.array_equal(levels.numpy(), np.array(NORMAL_LEVELS)[index] / 16)


def test_of_two_levels_equally_near_the_upper_one_is_taken() -> None:
    levels = torch.tensor(NORMAL_LEVELS) / 16
    middles = (levels[1:] + levels[:-1]) / 2
    assert nearest_codes(middles.clone(), NORMAL4).tolist() == list(range(-7, 8))
    below = torch.nextafter(middles, torch.tensor(-torch.inf))
    assert nearest_codes(below, NORMAL4).tolist() == list(range(-8, 7))


def test_integers_are_rounded_half_to_even() -> None:
    v = torch.tensor([-9.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 9])
    assert nearest_codes(v, INT4).tolist() == [-8, -2, -2, 0, 0, 2, 2, 6, 7]


@given(qtypes, st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=50))
def test_codes_rise_with_what_is_rounded(qtype, values) -> None:
    codes = nearest_codes(torch.tensor(sorted(values)), qtype)
    assert bool((codes.diff() >= 0).all())


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=lambda qtype: qtype.name)
def test_codes_are_their_own_levels_nearest(qtype) -> None:
    codes = torch.arange(qtype.qmin, qtype.qmax + 1)
    levels = torch.tensor(qtype.values)
    assert torch.equal(nearest_codes(levels.clone(), qtype).int(), codes.int())
    assert torch.equal(nearest_levels(levels.clone(), qtype), levels)


def test_the_largest_numbers_get_the_outermost_codes() -> None:
    v = torch.tensor([-torch.inf, -3e38, -8.5, 8.5, 3e38, torch.inf])
    assert nearest_codes(v, NORMAL4).tolist() == [-8, -8, -8, 7, 7, 7]


def test_what_is_no_number_gets_some_code() -> None:
    """Of a weight that another thread writes to; its version tells afterwards."""
    codes = nearest_codes(torch.tensor([torch.nan, 0.0]), NORMAL4).tolist()
    assert -8 <= codes[0] <= 7 and codes[1] == 0


@given(qtypes, st.sampled_from(METHODS), group_sizes, st.integers(0, 999), st.floats(0, 1))
def test_zeros_stay_zeros(qtype, method, g, seed, share) -> None:
    """Pruned weights keep theirs, whatever is beside them."""
    w = matrix("heavy", 5, 130, seed)
    zeros = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < share
    w.masked_fill_(zeros, 0)
    scale = choose_scale(w, qtype, g, method, torch.float16)
    codes = quantize_affine(w, scale, qtype, g)
    w_hat = dequantize_rows(pack(codes, qtype), scale, qtype, g, 130, torch.float16)
    assert not w_hat[zeros].any()


@given(qtypes, group_sizes, st.integers(0, 999))
def test_dequantized_weights_are_quantized_to_themselves(qtype, g, seed) -> None:
    """With the same scales: what is copied from one packed weight to another keeps its values."""
    w = matrix("gaussian", 4, 130, seed)
    scale = choose_scale(w, qtype, g, "mse", torch.float16)
    codes = quantize_affine(w, scale, qtype, g)
    w_hat = dequantize_rows(pack(codes, qtype), scale, qtype, g, 130, torch.float32)
    assert torch.equal(quantize_affine(w_hat, scale, qtype, g), codes)


def test_tables_made_under_another_default_type_are_the_same() -> None:
    v = torch.linspace(-9, 9, 1001)
    expected = nearest_levels(v.clone(), NORMAL4)
    _tables.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        found = nearest_levels(v.clone(), NORMAL4)
    finally:
        torch.set_default_dtype(torch.float32)
        _tables.cache_clear()
    assert found.dtype == torch.float32 and torch.equal(found, expected)
