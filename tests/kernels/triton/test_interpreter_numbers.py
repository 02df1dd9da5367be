"""The interpreter's arithmetic, element by element, against PyTorch's on the CPU."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from tests.kernels.triton.interpreter import interpreted

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FLOATS = (FP16, BF16, FP32)
TYPE_OF_BITS = {FP16: torch.int16, BF16: torch.int16, FP32: torch.int32}
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)
narrow_float = pytest.mark.parametrize("dtype", (FP16, BF16), ids=str)


@triton.jit
def _map_kernel(x_ptr, y_ptr, z_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    out = OP(tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs))
    tl.store(out_ptr + offs, out)


@triton.jit
def _add(x, y, z):
    return x + y


@triton.jit
def _subtract(x, y, z):
    return x - y


@triton.jit
def _multiply(x, y, z):
    return x * y


@triton.jit
def _divide(x, y, z):
    return x / y


@triton.jit
def _negate(x, y, z):
    return -x


@triton.jit
def _maximum(x, y, z):
    return tl.maximum(x, y)


@triton.jit
def _minimum(x, y, z):
    return tl.minimum(x, y)


@triton.jit
def _clamp(x, y, z):
    return tl.clamp(x, tl.minimum(y, 0.0), tl.maximum(y, 0.0))


@triton.jit
def _absolute(x, y, z):
    return tl.abs(x)


@triton.jit
def _compare(x, y, z):
    less = (x < y).to(tl.int32) + 2 * (x <= y).to(tl.int32) + 4 * (x == y).to(tl.int32)
    more = (x > y).to(tl.int32) + 2 * (x >= y).to(tl.int32) + 4 * (x != y).to(tl.int32)
    return less + 8 * more


@triton.jit
def _select(x, y, z):
    return tl.where((x < y) | (z > 0), x, z)


@triton.jit
def _constants(x, y, z):
    return tl.full(x.shape, 1.005, x.dtype) + x * 0.3


@triton.jit
def _identity(x, y, z):
    return x


@triton.jit
def _through_the_bits(x, y, z):
    return (x.to(tl.int16, bitcast=True) ^ -32768).to(x.dtype, bitcast=True)


def elementwise(
    op: object, *operands: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    x, y, z = (*operands, operands[0], operands[0])[:3]
    count = x.numel()
    padded = [torch.zeros(triton.next_power_of_2(count), dtype=t.dtype) for t in (x, y, z)]
    for whole, t in zip(padded, (x, y, z), strict=True):
        whole[:count] = t
    out = torch.empty(padded[0].shape, dtype=dtype or x.dtype)
    with interpreted():
        _map_kernel[(1,)](*padded, out, op, out.numel())
    return out[:count]


def any_bits(dtype: torch.dtype, count: int = 2**14) -> torch.Tensor:
    """Uniform in the bit patterns: all magnitudes, subnormals, infinities, NaN."""
    bits = torch.randint(-(2**31), 2**31, (count,))
    return bits.to(torch.int32).to(TYPE_OF_BITS[dtype]).view(dtype)


def number_of(op: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of a number and NaN, the number. (`torch.fmax` knows quiet NaN only.)"""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, op(x, y)))


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@narrow_float
@pytest.mark.parametrize(
    ("op", "want"),
    [
        (_add, lambda x, y, z: x + y),
        (_subtract, lambda x, y, z: x - y),
        (_multiply, lambda x, y, z: x * y),
        (_negate, lambda x, y, z: -x),
        (_absolute, lambda x, y, z: x.abs()),
        (_maximum, lambda x, y, z: number_of(torch.maximum, x, y)),
        (_minimum, lambda x, y, z: number_of(torch.minimum, x, y)),
        (
            _clamp,
            lambda x, y, z: number_of(torch.maximum, x, y.clamp(max=0)).clamp(max=y.clamp(min=0)),
        ),
        (_select, lambda x, y, z: torch.where((x < y) | (z > 0), x, z)),
        (_constants, lambda x, y, z: torch.full_like(x, 1.005) + x * torch.full_like(x, 0.3)),
        (_through_the_bits, lambda x, y, z: -x),
    ],
)
def test_arithmetic_is_pytorchs(op: object, want: object, dtype: torch.dtype) -> None:
    x, y, z = (any_bits(dtype) for _ in range(3))
    if op is _clamp:
        y = y.nan_to_num()
    assert_same(elementwise(op, x, y, z), want(x, y, z))


def test_quotients_of_bf16_are_fp32() -> None:
    x, y = any_bits(BF16), any_bits(BF16)
    assert_same(elementwise(_divide, x, y, dtype=FP32), x.float() / y.float())


@every_float
def test_comparisons_are_those_of_the_numbers(dtype: torch.dtype) -> None:
    x, y = any_bits(dtype), any_bits(dtype)
    y[::3] = x[::3]
    less = (x < y).int() + 2 * (x <= y).int() + 4 * (x == y).int()
    more = (x > y).int() + 2 * (x >= y).int() + 4 * (x != y).int()
    assert_same(elementwise(_compare, x, y, dtype=torch.int32), less + 8 * more)


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_between_floats_are_pytorchs(dtype: torch.dtype, to: torch.dtype) -> None:
    x = any_bits(dtype, 2**16)
    assert_same(elementwise(_identity, x, dtype=to), x.to(to))


@every_float
def test_casts_from_and_to_integers_are_pytorchs(dtype: torch.dtype) -> None:
    for integers in (torch.int8, torch.uint8, torch.int16, torch.int32):
        limits = torch.iinfo(integers)
        x = torch.randint(limits.min, limits.max + 1, (2**12,)).to(integers)
        assert_same(elementwise(_identity, x, dtype=dtype), x.to(dtype))
    x = (torch.randn(2**12) * 40).clamp(-128, 127).to(dtype)
    assert_same(elementwise(_identity, x, dtype=torch.int8), x.to(torch.int8))
