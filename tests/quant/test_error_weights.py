"""Weights h of squared errors against exhaustive searches in NumPy, and what h may be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.config import SiteOptions
from fqcompile.quant.affine import choose_scale
from fqcompile.quant.choose import choose_and_quantize, choose_plan, quantize_weight
from fqcompile.quant.granularity import estimate_errors, mean_ranges
from fqcompile.tensor.format import INT4, NORMAL4, QType
from tests.quant.strategies import KINDS, group_sizes, matrices, matrix
from tests.quant.test_scale_search import squared_errors


def error_weights(k: int, seed: int = 0) -> torch.Tensor:
    """As measured on activations: a few inputs have a hundred times the square of others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, generator=generator).mul(1.5).exp()


def weighted_errors(
    groups: np.ndarray, scale: np.ndarray, h: np.ndarray, qtype: QType
) -> np.ndarray:
    """sum h (w - ŵ)^2 of each group [N, G, g], in float64: each weight as a group of its own."""
    each = np.repeat(scale[..., None], groups.shape[-1], -1)
    return (h * squared_errors(groups[..., None], each, qtype.name)).sum(-1)


def least_errors(groups: np.ndarray, h: np.ndarray, qtype: QType) -> np.ndarray:
    """The least weighted error of each group over 600 steps of both signs."""
    peak = np.abs(groups).max(-1)
    fractions = np.linspace(0.01, 1.15, 400) / 8
    steps = np.concatenate([fractions, -fractions])
    return np.min([weighted_errors(groups, peak * c, h, qtype) for c in steps], axis=0)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier"])
@pytest.mark.parametrize("g", [32, 128, 1024])
@pytest.mark.parametrize("qtype", [INT4, NORMAL4], ids=lambda qtype: qtype.name)
def test_weighted_search_is_as_good_as_800_exact_candidates(
    qtype: QType, kind: str, g: int
) -> None:
    w, h = matrix(kind, 16, 1024), error_weights(1024)
    scale = choose_scale(w, qtype, g, "mse", torch.float32, h).double().numpy()
    plain = choose_scale(w, qtype, g, "mse", torch.float32).double().numpy()
    groups, weights = w.double().numpy().reshape(16, -1, g), h.double().numpy().reshape(-1, g)
    found = weighted_errors(groups, scale, weights, qtype).sum()
    # Without weights within 1%; few weights count much here, which is as if groups were smaller.
    assert found < 1.02 * least_errors(groups, weights, qtype).sum()
    assert found < weighted_errors(groups, plain, weights, qtype).sum()


@given(matrices(), group_sizes, st.integers(0, 99), st.integers(-120, 120))
def test_a_power_of_two_times_h_is_the_same(
    w: torch.Tensor, g: int, seed: int, exponent: int
) -> None:
    options = SiteOptions(granularity=min(g, w.shape[1]))
    h = error_weights(w.shape[1], seed)
    _, one = choose_and_quantize(w, options, torch.float16, h)
    _, other = choose_and_quantize(w, options, torch.float16, h * 2.0**exponent)
    assert all(map(torch.equal, one.tensors, other.tensors))


@given(matrices(), group_sizes, st.integers(-149, 127))
def test_equal_weights_are_none(w: torch.Tensor, g: int, exponent: int) -> None:
    equal = torch.full((w.shape[1],), 2.0**exponent)
    options = SiteOptions(granularity=min(g, w.shape[1]))
    results = [choose_and_quantize(w, options, torch.float16, h)[1] for h in (None, equal)]
    assert all(map(torch.equal, results[0].tensors, results[1].tensors))


@given(st.sampled_from(KINDS), group_sizes, st.integers(0, 99), st.data())
def test_groups_that_nothing_reads_are_quantized_as_without_weights(
    kind: str, g: int, seed: int, data: st.DataObject
) -> None:
    w, h = matrix(kind, 4, 130, seed), error_weights(130, seed)
    unread = data.draw(st.integers(0, (130 - 1) // g), label="unread")
    h[unread * g : (unread + 1) * g] = 0
    weighted = choose_scale(w, INT4, g, "mse", torch.float16, h)
    plain = choose_scale(w, INT4, g, "mse", torch.float16)
    assert torch.equal(weighted[:, unread].float(), plain[:, unread].float())


def test_zeros_throughout_say_nothing() -> None:
    w = matrix("heavy", 16, 256)
    results = [choose_and_quantize(w, SiteOptions(), torch.float16, h) for h in (None, w[0] * 0)]
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1].tensors, results[1][1].tensors))


@given(st.permutations(range(6)), st.integers(0, 99))
def test_rows_do_not_know_each_other(order: list[int], seed: int) -> None:
    w, h = matrix("heavy", 6, 96, seed), error_weights(96, seed)
    scale = choose_scale(w, INT4, 32, "mse", torch.float16, h)
    assert torch.equal(choose_scale(w[order], INT4, 32, "mse", torch.float16, h), scale[order])


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier"])
@pytest.mark.parametrize("qtype", [INT4, NORMAL4], ids=lambda qtype: qtype.name)
def test_estimates_are_weighted(qtype: QType, kind: str) -> None:
    w, h, sizes = matrix(kind, 16, 1024), error_weights(1024), (1024, 128, 32)
    estimates = estimate_errors(w, sizes, SiteOptions(levels=qtype.levels), h)
    exact, weights = w.double().numpy(), h.double().numpy()
    for g, estimate in zip(sizes, estimates, strict=True):
        scale = choose_scale(w, qtype, g, "mse", torch.float32, h).double().numpy()
        groups = exact.reshape(16, -1, g)
        squares = weighted_errors(groups, scale, weights.reshape(-1, g), qtype)
        relative = math.sqrt(squares.sum() / (weights * exact**2).sum())
        assert relative * (1 - 1e-4) < estimate < relative * 1.04  # refits; measured 1.034


def test_ranges_are_weighted() -> None:
    w, h = matrix("heavy", 8, 100), error_weights(100)
    peaks = np.stack([w[:, i : i + 32].abs().amax(1).numpy() for i in range(0, 100, 32)], 1)
    sums = np.array([h[i : i + 32].sum().item() for i in range(0, 100, 32)])
    expected = (peaks * sums / sums.sum()).sum(1).mean()
    np.testing.assert_allclose(mean_ranges(w, (32,), h), [expected], rtol=1e-6)


def test_the_rule_is_decided_by_what_is_read() -> None:
    """Outliers of inputs that nothing reads call for no finer groups."""
    w = matrix("gaussian", 32, 1024)
    w[:, 512::16] *= 100
    h = torch.ones(1024)
    h[512::16] = 0
    plain = choose_plan(w, SiteOptions(), torch.float16)
    weighted = choose_plan(w, SiteOptions(), torch.float16, h)
    assert plain.group_size == 32 and weighted.group_size > 32


def test_each_expert_has_its_own_weights() -> None:
    w = torch.stack([matrix("heavy", 8, 128, seed) for seed in range(3)])
    h = torch.stack([error_weights(128, seed) for seed in range(3)])
    plan, weight = choose_and_quantize(w, SiteOptions(), torch.float16, h)
    for i, expert in enumerate(weight.unbind()):
        alone = quantize_weight(w[i], plan, h[i])
        assert all(map(torch.equal, expert.tensors, alone.tensors))
    assert all(map(torch.equal, quantize_weight(w, plan, h).tensors, weight.tensors))


@pytest.mark.parametrize(
    "h, text",
    [
        (torch.ones(64, dtype=torch.float16), r"h is torch.float16 \(64,\).*torch.float32 \(64,\)"),
        (torch.ones(63), r"h is torch.float32 \(63,\)"),
        (torch.ones(1, 64), r"h is torch.float32 \(1, 64\)"),
        (torch.full((64,), torch.nan), "negative, infinite or NaN.*pass None"),
        (torch.full((64,), torch.inf), "negative, infinite or NaN"),
        (-torch.ones(64), "negative, infinite or NaN"),
    ],
)
def test_other_weights_are_refused(h: torch.Tensor, text: str) -> None:
    w = matrix("gaussian", 8, 64)
    plan = choose_plan(w, SiteOptions(), torch.float16)
    with pytest.raises(ValueError, match=text):
        choose_and_quantize(w, SiteOptions(), torch.float16, h)
    with pytest.raises(ValueError, match=text):
        quantize_weight(w, plan, h)
