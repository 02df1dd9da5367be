"""Moments and h: means of squares in float64, what rows and scales cannot change, fallbacks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.quant.calibration import Calibration, Moments, fixed_random_numbers

# half a unit of bfloat16's last of eight bits, and what the float64 sums may differ by
ROUNDING = 2.0**-8


def _x(rows: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, k, generator=generator) * torch.rand(k, generator=generator).exp()


def _h(*batches: Tensor, experts: int = 0) -> Tensor:
    k = batches[0].shape[-1]
    moments = Moments([experts, 3, k] if experts else [3, k])
    for x in batches:
        moments.add(x)
    h = moments.h()
    assert h is not None
    return h


def _oracle(x: Tensor) -> Tensor:
    mean = x.double().square().mean(0)
    return mean / mean.mean() / 2 + 0.5


SIZES = st.integers(1, 40)


@given(SIZES, SIZES, st.integers(0, 99))
def test_h_is_the_blended_mean_of_squares(rows: int, k: int, seed: int) -> None:
    x = _x(rows, k, seed)
    torch.testing.assert_close(_h(x)[0].double(), _oracle(x), rtol=ROUNDING, atol=0)


@given(st.integers(2, 40), SIZES, st.integers(0, 99), st.integers(-20, 20))
def test_order_of_rows_batches_and_scale_do_not_matter(
    rows: int, k: int, seed: int, exponent: int
) -> None:
    x = _x(rows, k, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    parts = x.split([rows // 2, rows - rows // 2])
    for other in (_h(x[order]), _h(*parts), _h(x * 2.0**exponent), _h(x.view(1, rows, k))):
        # sums in another order differ in their last bits, which the rounding rarely lets through
        assert ((other - _h(x)).abs() <= ROUNDING * other).all()
    assert torch.equal(_h(x * 2.0**exponent), _h(x))


def test_large_inputs_are_summed_in_pieces_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _x(100, 7, 0)
    whole = _h(x)
    monkeypatch.setattr("fqcompile.quant.calibration._CHUNK", 50)
    assert torch.equal(_h(x), whole)


def test_experts_without_rows_get_the_mean_of_their_stack() -> None:
    moments, xs = Moments([4, 3, 8]), [_x(5, 8, 1), _x(9, 8, 2)]
    moments.add(xs[0], 0)
    moments.add(xs[1], 2)
    found = Calibration.of(moments, "synthetic", "synthetic")
    assert found.h is not None and found.h.shape == (4, 8)
    for expert, x in enumerate([xs[0], torch.cat(xs), xs[1], torch.cat(xs)]):
        torch.testing.assert_close(found.h[expert].double(), _oracle(x), rtol=ROUNDING, atol=0)
    assert found.source == "synthetic, 2 of 4 experts without rows" and found.rows == 14


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(0, 4), "no row came to it"),
        (torch.zeros(3, 4), "zeros or not finite"),
        (torch.full((3, 4), torch.inf), "zeros or not finite"),
        (torch.full((3, 4), torch.nan), "zeros or not finite"),
    ],
    ids=["none", "zero", "infinite", "nan"],
)
def test_what_says_nothing_counts_errors_alike(x: Tensor, reason: str) -> None:
    moments = Moments([3, 4])
    moments.add(x)
    found = Calibration.of(moments, "synthetic", "synthetic")
    assert found.h is None and reason in found.source


def test_random_numbers_are_fixed_inside_and_untouched_outside() -> None:
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with fixed_random_numbers([torch.device("cpu")]):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn) and torch.equal(torch.get_rng_state(), state)


def test_random_numbers_of_gpus_that_no_tensor_is_on_are_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    with fixed_random_numbers([torch.device("cpu")]):
        pass
    assert not seeded
