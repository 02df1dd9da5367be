"""Group counts, candidates, stored bits; the rules against their definitions, written in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.config import SiteOptions
from fqcompile.quant import granularity
from fqcompile.quant.choose import choose_plan
from fqcompile.quant.granularity import (
    adaptive_rule,
    bits_per_weight,
    estimate_errors,
    group_size_candidates,
    mean_ranges,
    range_rule,
)
from fqcompile.tensor.format import num_groups
from tests.quant.strategies import KINDS, matrix


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


CANDIDATES = (256, 128, 64, 32)


def outlier_columns(n=64, k=1024, every=64):
    """Gaussian, with some input channels thirty times larger: outliers along K in every row."""
    w = matrix("gaussian", n, k)
    w[:, ::every] *= 30
    return w


def numpy_mean_ranges(w, candidates):
    magnitudes = np.abs(w.double().numpy())
    return [
        np.mean(np.maximum.reduceat(magnitudes, range(0, w.shape[1], g), 1)) for g in candidates
    ]


@given(st.sampled_from(KINDS), st.sampled_from([256, 100, 384]), st.integers(0, 99))
def test_mean_ranges_equal_numpy(kind, k, seed):
    w = matrix(kind, 5, k, seed)
    sizes = (k, 64, 32)
    np.testing.assert_allclose(mean_ranges(w, sizes), numpy_mean_ranges(w, sizes), rtol=1e-6)


@given(st.sampled_from(KINDS), st.floats(0.5, 0.99), st.integers(0, 99))
def test_range_rule_is_the_papers_loop(kind, alpha, seed):
    w = matrix(kind, 5, 256, seed)
    ranges = mean_ranges(w, CANDIDATES)
    expected = 0
    while expected + 1 < len(CANDIDATES) and ranges[expected + 1] < alpha * ranges[expected]:
        expected += 1
    chosen = range_rule(w, CANDIDATES, SiteOptions(alpha=alpha), 16)
    assert chosen == CANDIDATES[expected]


@pytest.mark.parametrize("k", [384, 1024, 4096, 11008])
def test_gaussian_stays_per_column_under_range(k):
    w = matrix("gaussian", 32, k)
    assert choose_plan(w, SiteOptions(granularity="range"), torch.float16).group_size == k


def test_outliers_along_k_become_fine_under_both_rules():
    w = outlier_columns(every=512)
    for rule in ("range", "adaptive"):
        plan = choose_plan(w, SiteOptions(granularity=rule), torch.float16)
        assert plan.group_size <= 64, rule


def test_alpha_decides():
    w = matrix("gaussian", 32, 1024)
    sizes = [
        choose_plan(w, SiteOptions(granularity="range", alpha=a), torch.float16).group_size
        for a in (0.9, 0.99)
    ]
    assert sizes == [1024, 32]


def exact_costs(w, candidates, bits, scale_bits):
    """1.4 log2(error) + bits of the definition, with delivered errors."""
    costs = []
    for g in candidates:
        granularity = "column" if g == w.shape[1] else g
        options = SiteOptions(bits=bits, granularity=granularity)
        error = choose_plan(w, options, torch.float16).relative_error
        costs.append(1.4 * math.log2(error) + bits + scale_bits * -(-w.shape[1] // g) / w.shape[1])
    return costs


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier columns"])
def test_adaptive_choice_costs_least_within_the_estimates_accuracy(kind):
    w = outlier_columns(32, 256, every=128) if " " in kind else matrix(kind, 32, 256)
    assert min(estimate_errors(w, CANDIDATES, SiteOptions())) > 0.01
    chosen = adaptive_rule(w, CANDIDATES, SiteOptions(), 16)
    costs = exact_costs(w, CANDIDATES, 4, 16)
    # Estimates are within 2% of the error of each candidate: 1.4 log2(1.02) = .04.
    assert costs[CANDIDATES.index(chosen)] <= min(costs) + 0.04


@given(
    drops=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    finest=st.floats(0.004, 0.1),
    bits=st.sampled_from([4, 8]),
)
def test_adaptive_stops_early_only_where_no_coarser_size_could_win(drops, finest, bits):
    """Whatever the errors are, as long as finer groups have none that is larger."""
    candidates, w = (1024, 512, 256, 128, 64, 32), torch.empty(8, 1024)
    errors = dict(zip(reversed(candidates), finest * np.exp(np.cumsum(drops)), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            granularity, "estimate_errors", lambda w, sizes, *_: [errors[s] for s in sizes]
        )
        chosen = adaptive_rule(w, candidates, SiteOptions(bits=bits), 16)
    good = [size for size in candidates if errors[size] <= 0.01]
    costs = [1.4 * math.log2(errors[g]) + bits_per_weight(bits, 8, 1024, g, 16) for g in candidates]
    assert chosen == (good[0] if good else candidates[costs.index(min(costs))])


def test_tails_make_groups_finer_and_none_coarser():
    """Student's t of 8 degrees of freedom has tails about as heavy as those of real weights."""
    generator = np.random.default_rng(0)
    drawn = {
        "heavy": generator.standard_t(3, (256, 1024)),
        "real": generator.standard_t(8, (256, 1024)),
        "flat": generator.uniform(-1, 1, (256, 1024)),
    }
    sizes = {
        kind: choose_plan(torch.from_numpy(w).float(), SiteOptions(), torch.float16).group_size
        for kind, w in drawn.items()
    }
    assert sizes["heavy"] == 32 and sizes["real"] == 64 and sizes["flat"] >= 256


def test_adaptive_counts_the_scales():
    """Wider scales must never make a choice finer, and dear ones make it coarse."""
    w = matrix("gaussian", 32, 256)
    sizes = [adaptive_rule(w, CANDIDATES, SiteOptions(), b) for b in (1, 16, 32, 256)]
    assert sizes == sorted(sizes) and sizes[0] == 32 and sizes[-1] == 256


def test_adaptive_int8_stays_per_column_when_good_enough():
    w = matrix("gaussian", 32, 1024)
    plan = choose_plan(w, SiteOptions(bits=8), torch.float16)
    assert plan.group_size == 1024 and plan.relative_error <= 0.01


def test_adaptive_takes_the_coarsest_that_is_good_enough():
    w = outlier_columns()
    errors = estimate_errors(w, (1024, 32), SiteOptions(bits=8))
    assert errors[0] > 0.01
    plan = choose_plan(w, SiteOptions(bits=8), torch.float16)
    candidates = (1024, 512, 256, 128, 64, 32)
    good = [
        g
        for g, e in zip(
            candidates, estimate_errors(w, candidates, SiteOptions(bits=8)), strict=True
        )
        if e <= 0.01
    ]
    assert plan.group_size == (good[0] if good else plan.group_size)


def test_a_few_outlier_rows_are_not_overlooked():
    """Four rows of 4000 hold nearly all of the norm: the choice must be theirs."""
    w = matrix("gaussian", 4000, 256) * 1e-3
    w[[5, 1500, 2222, 3999]] = outlier_columns(4, 256, every=128) * 100
    alone = w[[5, 1500, 2222, 3999]]
    errors = [estimate_errors(m, CANDIDATES, SiteOptions()) for m in (w, alone)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-3)


def test_zero_matrix_and_ties_take_the_fewest_bytes():
    w = torch.zeros(4, 256)
    for rule in ("adaptive", "range"):
        plan = choose_plan(w, SiteOptions(granularity=rule), torch.float16)
        assert (plan.group_size, plan.relative_error) == (256, 0.0)
