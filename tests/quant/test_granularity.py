"""Group counts, candidates and stored bits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.quant.granularity import bits_per_weight, group_size_candidates, num_groups


@pytest.mark.parametrize(
    ("k", "least", "expected"),
    [
        (4096, 32, (4096, 2048, 1024, 512, 256, 128, 64, 32)),
        (384, 32, (384, 128, 64, 32)),
        (100, 32, (100, 64, 32)),
        (33, 32, (33, 32)),
        (32, 32, (32,)),
        (1, 32, (1,)),
        (3, 1, (3, 1)),
        (64, 1024, (64,)),
    ],
)
def test_candidates_are_k_then_powers_of_two(k, least, expected):
    assert group_size_candidates(k, least) == expected


@given(st.integers(1, 20000), st.integers(0, 10))
def test_candidates_descend_and_prefer_divisors(k, exponent):
    least = 2**exponent
    first, *powers = group_size_candidates(k, least)
    assert first == k
    assert powers == sorted(set(powers), reverse=True)
    assert all(least <= g < k and g & (g - 1) == 0 for g in powers)
    divides = [k % g == 0 for g in powers]
    assert all(divides) or not any(divides)
    assert bool(powers) == (least < k)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_groups_cover_the_row(k, g):
    groups = num_groups(k, g)
    assert (groups - 1) * g < k <= groups * g


@pytest.mark.parametrize(
    ("bits", "k", "g", "scale_bits", "expected"),
    [
        (4, 128, 64, 16, 4.25),
        (8, 128, 128, 32, 8.25),
        (4, 100, 64, 16, 4.32),
        (4, 3, 3, 16, (16 + 16) / 3),
    ],
)
def test_bits_per_weight_counts_scales_and_padding(bits, k, g, scale_bits, expected):
    assert bits_per_weight(bits, 7, k, g, scale_bits) == pytest.approx(expected, rel=1e-12)
