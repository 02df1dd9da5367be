"""Triton's interpreter with the arithmetic of the hardware.

Upstream keeps bf16 as bit patterns in uint16 and computes on those as integers; it truncates when
it rounds to bf16, rounds `tl.fma` twice, and lets NaN through `tl.maximum`. Here every operation
takes the values, in float64 where that is exact, and rounds once, to nearest even.
"""

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter as upstream

Handle = upstream.TensorHandle

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
NARROW = (tl.float16, tl.bfloat16)
# What the tensor cores do not read of an fp32 operand at "tf32".
TF32_IGNORES = np.uint32(0x1FFF)


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bf16, ties to even, in one rounding; NaN stays NaN."""
    values = np.asarray(values)
    nearest = np.ascontiguousarray(values, np.float32).reshape(values.shape)
    bits = nearest.view(np.uint32)
    if values.dtype == np.float64:
        # On the way through fp32, round to odd: nothing then looks like a tie that was none.
        inexact = nearest != values
        bits = np.where(inexact, (bits - (np.abs(nearest) > np.abs(values))) | 1, bits)
        bits = bits.astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def multiply_add_to_odd(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of numbers that fp32 holds, as a float64 that is still to be rounded to the type.

    The product of two 24-bit significands is exact. The sum is not; rounding it to nearest here and
    to fp32 later would be two roundings. So it is rounded to odd: TwoSum gives the error, and where
    there is one, an even significand moves one step towards it. With at least two bits more than
    the final type that makes the final rounding right (Boldo and Melquiond, 2008).
    """
    product = x.astype(np.float64) * y.astype(np.float64)
    z = z.astype(np.float64)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    even = (total.view(np.int64) & 1) == 0
    towards = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    # The error of an infinite or NaN sum is NaN.
    return np.where(even & np.isfinite(error) & (error != 0), towards, total)


def values(handle: Any) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    assert handle.data.dtype == np.uint16, f"bf16 kept as {handle.data.dtype}"
    return bf16_to_float(handle.data)


def rounded(exact: np.ndarray, dtype: Any) -> Any:
    """A handle of type `dtype` with `exact` (float64 or float32) rounded once."""
    if dtype == tl.bfloat16:
        return Handle(float_to_bf16(exact), dtype)
    return Handle(exact.astype(upstream._get_np_dtype(dtype)), dtype)


class HardwareNumbers(upstream.InterpreterBuilder):
    def get_bf16(self, value: float) -> Any:
        return rounded(np.array([value], np.float64), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        dtype = dst_type.scalar
        if src.dtype.scalar.is_fp8() or dtype.is_fp8():
            raise NotImplementedError(f"{src.dtype} -> {dst_type} is not emulated")
        data = values(src)
        # An integer becomes bf16 by way of fp32, on GPUs as well.
        if dtype == tl.bfloat16 and data.dtype != np.float64:
            data = data.astype(np.float32)
        return rounded(data, dtype)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        raise NotImplementedError(f"{src.dtype} -> {dst_type}, {rounding_mode}, is not emulated")

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        dtype = lhs.dtype.scalar
        if tl.bfloat16 in (dtype, rhs.dtype.scalar):
            assert dtype == rhs.dtype.scalar, f"{op}({lhs.dtype}, {rhs.dtype})"
        if op in COMPARISONS:
            # Upstream calls the result what the operands are, and bf16 booleans would be decoded.
            return Handle(op(values(lhs), values(rhs)), tl.int1)
        if dtype != tl.bfloat16:
            return super().binary_op(lhs, rhs, op)
        return rounded(op(values(lhs).astype(np.float64), values(rhs).astype(np.float64)), dtype)

    def unary_op(self, arg: Any, op: Any) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return super().unary_op(arg, op)
        return rounded(op(values(arg).astype(np.float64)), tl.bfloat16)

    # By default the GPU's min and max return the operand that is not NaN.
    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
        if propagate_nans == upstream._ir.PROPAGATE_NAN.ALL:
            return self.create_minimumf(self.create_maximumf(arg, low), high)
        return self.create_minnumf(self.create_maxnumf(arg, low), high)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        dtype = z.dtype.scalar
        assert x.dtype.scalar == y.dtype.scalar == dtype
        if dtype not in (*NARROW, tl.float32):
            raise NotImplementedError(f"fma of {dtype} is not emulated")
        return rounded(multiply_add_to_odd(values(x), values(y), values(z)), dtype)

    def create_dot(self, a: Any, b: Any, acc: Any, precision: Any, max_imprecise: Any) -> Any:
        dtype = acc.dtype.scalar
        x, y = values(a), values(b)
        if dtype == tl.int32:
            # Exact in float64, which BLAS multiplies faster than NumPy does integers.
            exact = np.matmul(x.astype(np.float64), y.astype(np.float64))
            return Handle(exact.astype(np.int64).astype(np.int32) + acc.data, dtype)
        if a.dtype.scalar == tl.float32 and precision == upstream._ir.INPUT_PRECISION.TF32:
            x, y = (_without_bits(operand, TF32_IGNORES) for operand in (x, y))
        if dtype == tl.float64:
            return Handle(np.matmul(x, y) + acc.data, dtype)
        total = np.matmul(x.astype(np.float32), y.astype(np.float32)) + values(acc)
        return rounded(total, dtype)


def _without_bits(operand: np.ndarray, ignored: np.uint32) -> np.ndarray:
    return (np.ascontiguousarray(operand).view(np.uint32) & ~ignored).view(np.float32)


def _sum(self: Any, argument: Any) -> Any:
    """A tree that rounds each partial sum to the type, as the GPU does in an order of its own."""
    dtype = argument.dtype.scalar
    if dtype not in NARROW:
        return _upstream_sum(self, argument)
    data = values(argument.handle)
    shape = list(data.shape)
    data = data.reshape(-1) if self.axis is None else np.moveaxis(data, self.axis, 0)
    while len(data) > 1:
        half = len(data) // 2
        data = values(rounded(data[:half].astype(np.float32) + data[half:], dtype))
    if self.keep_dims:
        kept = [1] * len(shape)
        if self.axis is not None:
            kept = [1 if i == self.axis % len(shape) else size for i, size in enumerate(shape)]
        data = data.reshape(kept)
    else:
        data = data[0]
    return self.to_tensor(rounded(np.asarray(data, np.float32), dtype).data, argument.dtype)


_upstream_sum = upstream.ReduceOps.sum


def patch_reductions(patch: pytest.MonkeyPatch) -> None:
    """Reductions do not go through the builder. (Scans do not either; they promote bf16.)"""
    patch.setattr(upstream.ReduceOps, "sum", _sum)
