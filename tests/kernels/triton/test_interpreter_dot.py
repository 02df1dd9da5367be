"""The interpreter's dot products and reductions, against PyTorch's on the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.test_interpreter_numbers import (
    BF16,
    FP32,
    assert_same,
    every_float,
    narrow_float,
)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    c = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=PRECISION)
    tl.store(c_ptr + offs, c)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    out = OP(x)
    if out.numel == ROWS * COLUMNS:
        offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    else:
        offs = tl.arange(0, ROWS)
    tl.store(out_ptr + offs, out)


@triton.jit
def _sum(x):
    return tl.sum(x, axis=1)


@triton.jit
def _max(x):
    return tl.max(x, axis=1)


@triton.jit
def _cumulate(x):
    return tl.cumsum(x, axis=1)


@every_float
def test_dot_multiplies_the_numbers_and_adds_in_fp32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(64, 64).to(dtype) for _ in range(2))
    a[:, 0] = torch.finfo(dtype).smallest_normal / 2
    b[0] = 1 / torch.finfo(dtype).smallest_normal
    c = torch.empty(64, 64)
    with interpreted():
        _dot_kernel[(1,)](a, b, c, "ieee", 64)
    tolerance = 64 * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert ((c.double() - a.double() @ b.double()).abs() <= tolerance).all()
    assert (c.double() - (a.double() @ b.double())).abs().max() > 0


def test_dot_of_fp32_loses_bits_unless_it_is_ieee() -> None:
    x, one, got = torch.randn(32, 32), torch.eye(32), torch.empty(32, 32)
    with interpreted():
        _dot_kernel[(1,)](x, one, got, "ieee", 32)
        assert_same(got, x)
        _dot_kernel[(1,)](x, one, got, "tf32", 32)
    assert_same(got, (x.view(torch.int32) & -(2**13)).view(FP32))


def test_dot_of_int8_is_exact() -> None:
    a, b = (torch.randint(-128, 128, (32, 32)).to(torch.int8) for _ in range(2))
    c = torch.empty(32, 32, dtype=torch.int32)
    with interpreted():
        _dot_kernel[(1,)](a, b, c, None, 32)
    assert_same(c, a.int() @ b.int())


@narrow_float
def test_sum_rounds_every_partial_sum(dtype: torch.dtype) -> None:
    x = torch.randn(8, 64).to(dtype)
    got = torch.empty(8, dtype=dtype)
    with interpreted():
        _reduce_kernel[(1,)](x, got, _sum, 8, 64)
    want = x
    while want.shape[1] > 1:
        left, right = want.chunk(2, 1)
        want = left + right
    assert_same(got, want[:, 0])


@narrow_float
def test_max_and_cumsum_are_those_of_the_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(8, 16).to(dtype)
    largest, running = torch.empty(8, dtype=dtype), torch.empty(8, 16, dtype=dtype)
    with interpreted():
        _reduce_kernel[(1,)](x, largest, _max, 8, 16)
        _reduce_kernel[(1,)](x, running, _cumulate, 8, 16)
    assert_same(largest, x.amax(1))
    # Triton promotes bf16 here.
    wide = x.float() if dtype == BF16 else x
    want = [wide[:, 0]]
    for column in wide.T[1:]:
        want.append(want[-1] + column)
    assert_same(running, torch.stack(want, 1).to(dtype))
