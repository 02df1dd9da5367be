"""The interpreter rounds once, to bf16 and in fused multiply-adds, against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from tests.kernels.triton.interpreter_numbers import bf16_to_float, float_to_bf16
from tests.kernels.triton.test_interpreter_numbers import (
    BF16,
    FP16,
    FP32,
    _identity,
    any_bits,
    assert_same,
    elementwise,
    every_float,
)


@triton.jit
def _fma(x, y, z):
    return tl.fma(x, y, z)


@triton.jit
def _bytes_as_bf16(x, y, z):
    subnormal = x.to(tl.int16).to(tl.bfloat16, bitcast=True)
    scale = tl.full(x.shape, 2.0**123, tl.bfloat16)
    return tl.fma(subnormal, scale, tl.full(x.shape, -128 * 2.0**-10, tl.bfloat16))


@triton.jit
def _bytes_as_fp16(x, y, z):
    subnormal = x.to(tl.int16).to(tl.float16, bitcast=True)
    scale = tl.full(x.shape, 2.0**15, tl.float16)
    return tl.fma(subnormal, scale, tl.full(x.shape, -128 * 2.0**-9, tl.float16))


def round_exactly(value: Fraction, dtype: torch.dtype) -> float:
    """The nearest number of the type, ties to even."""
    bits, lowest = {FP16: (11, -24), BF16: (8, -133), FP32: (24, -149)}[dtype]
    if value == 0:
        return 0.0
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - bits - 1
    while abs(value) >= Fraction(2) ** (exponent + bits):
        exponent += 1
    spacing = Fraction(2) ** max(exponent, lowest)
    # round() of a Fraction takes ties to even.
    nearest = round(value / spacing) * spacing
    limit = Fraction(torch.finfo(dtype).max)
    return float(nearest) if abs(nearest) <= limit else float("inf") * (1 if value > 0 else -1)


def test_every_bf16_survives_the_way_to_float_and_back() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    np.testing.assert_array_equal(bf16_to_float(bits), numbers.float().numpy())
    number = ~np.isnan(bf16_to_float(bits))
    np.testing.assert_array_equal(float_to_bf16(bf16_to_float(bits))[number], bits[number])


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    midpoints = (torch.arange(2**16, dtype=torch.int64) << 16 | 0x8000).to(torch.int32)
    floats = torch.cat((any_bits(FP32, 100_000), midpoints.view(torch.float32)))
    assert_same(elementwise(_identity, floats, dtype=BF16), floats.bfloat16())


@given(st.floats(-(2.0**127), 2.0**127), st.integers(-3, 3))
def test_rounding_to_bf16_is_a_single_one(near: float, steps: int) -> None:
    # Near the midpoint of two bf16, where rounding to fp32 first would make a tie.
    bits = int(float_to_bf16(np.array([near]))[0])
    midpoint = np.float64(bf16_to_float(np.array([bits], np.uint16))[0]) * (1 + 2.0**-9)
    for value in (near, midpoint + steps * np.spacing(midpoint)):
        got = float(bf16_to_float(float_to_bf16(np.array([value])))[0])
        assert got == round_exactly(Fraction(float(value)), BF16)


@every_float
@given(seed=st.integers(0, 10**6))
def test_fma_rounds_once(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, y, z = (any_bits(dtype, 256).nan_to_num() for _ in range(3))
    # Cancellation, and addends so small that they only break a tie.
    z[:64] = -(x[:64].double() * y[:64].double()).to(dtype).nan_to_num()
    x[64:128] = torch.randint(2**7, 2**8, (64,)).to(dtype)
    y[64:128] = 1 + torch.randint(1, 2**7, (64,)).to(dtype) * 2.0**-7
    z[64:128] *= torch.finfo(dtype).smallest_normal
    exact = [
        Fraction(a) * Fraction(b) + Fraction(c)
        for a, b, c in zip(*(t.tolist() for t in (x, y, z)), strict=True)
    ]
    want = torch.tensor([round_exactly(value, dtype) for value in exact], dtype=torch.float64)
    assert_same(elementwise(_fma, x, y, z).double(), want)


def test_fma_rounds_once_where_a_sum_in_float64_would_round_twice() -> None:
    # The product is a tie of two fp32; what breaks it is below float64's last bit.
    x, y = torch.tensor([1 + 2.0**-23]), torch.tensor([1 + 2.0**-1])
    for sign in (1.0, -1.0):
        z = torch.tensor([sign * 2.0**-80])
        want = 1.5 + (2.0**-22 if sign > 0 else 2.0**-23)
        assert elementwise(_fma, x, y, z).item() == want
        # Here the rounded sum is off the tie, by one bit, and its error points back to it.
        z = torch.tensor([sign * 2.0**-52 * (1 - 2.0**-24)])
        assert elementwise(_fma, x, y, z).item() == want


@every_float
def test_fma_keeps_infinity_and_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, torch.inf, torch.nan, 1.0, 0.0], dtype=dtype)
    y = torch.tensor([1.0, 1.0, 1.0, 1.0, torch.inf], dtype=dtype)
    z = torch.tensor([1.0, -torch.inf, 1.0, torch.inf, 1.0], dtype=dtype)
    want = torch.tensor([torch.inf, torch.nan, torch.nan, torch.inf, torch.nan], dtype=dtype)
    assert_same(elementwise(_fma, x, y, z), want)


def test_every_byte_is_read_as_a_subnormal_and_rescaled_exactly() -> None:
    codes = torch.arange(256)
    got = elementwise(_bytes_as_bf16, codes.to(torch.uint8), dtype=BF16)
    assert_same(got.double(), (codes - 128).double() * 2.0**-10)
    got = elementwise(_bytes_as_fp16, codes.to(torch.uint8), dtype=FP16)
    assert_same(got.double(), (codes - 128).double() * 2.0**-9)
