"""The interpreter that the kernel tests rely on."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from tests.kernels.triton.interpreter import bf16_to_float, float_to_bf16, interpreted


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def _add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x + x)


def test_every_bf16_survives_the_way_to_float_and_back() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    np.testing.assert_array_equal(bf16_to_float(bits), values.float().numpy())
    number = ~np.isnan(bf16_to_float(bits))
    np.testing.assert_array_equal(float_to_bf16(bf16_to_float(bits))[number], bits[number])


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    floats = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    midpoints = (torch.arange(2**15, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    values = torch.cat((floats, midpoints))
    values = values[~values.isnan()]
    want = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(float_to_bf16(values.numpy()), want)


def test_an_access_outside_of_the_tensors_raises() -> None:
    x, y = torch.arange(8.0), torch.zeros(8)
    with interpreted():
        _copy_kernel[(1,)](x, y, 8, BLOCK=16)
        assert torch.equal(x, y)
        with pytest.raises(Exception, match="1 of 9 lanes are out of bounds"):
            _copy_kernel[(1,)](x, y, 9, BLOCK=16)
        with pytest.raises(Exception, match="1 of 8 lanes are out of bounds"):
            _copy_kernel[(1,)](x, y[:7], 8, BLOCK=16)


def test_arithmetic_on_bf16_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with interpreted(), pytest.raises(Exception, match="not emulated"):
        _add_kernel[(1,)](x, x, BLOCK=16)


def test_triton_is_as_before_afterwards() -> None:
    run, load = triton.JITFunction.run, tl.load
    with interpreted():
        assert triton.JITFunction.run is not run
        _copy_kernel[(1,)](torch.ones(4), torch.ones(4), 4, BLOCK=4)
    assert triton.JITFunction.run is run
    assert tl.load is load
