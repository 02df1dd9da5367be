"""Runs kernels without a GPU, in the process that also compiles them: Triton's interpreter, with

* bf16 that is right (upstream computes on its bit patterns and truncates when it rounds to it), and
* every access checked to lie in a tensor that was passed to the launch (upstream reads raw memory).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

Handle = upstream.TensorHandle
Builder = upstream.InterpreterBuilder


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _values(handle: Any) -> np.ndarray:
    return bf16_to_float(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _cast(self: Any, source: Any, dst_type: Any) -> Any:
    dtype = dst_type.scalar
    values = _values(source)
    if dtype == tl.bfloat16:
        return Handle(float_to_bf16(values.astype(np.float32)), dtype)
    return Handle(values.astype(upstream._get_np_dtype(dst_type)), dtype)


def _dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
    product = np.matmul(_values(a).astype(np.float32), _values(b).astype(np.float32))
    return Handle(product + acc.data, acc.dtype.scalar)


def _refuse_bf16_arithmetic(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    assert tl.bfloat16 not in (lhs.dtype.scalar, rhs.dtype.scalar), f"bf16 {op} is not emulated"
    return Handle(op(lhs.data, rhs.data), lhs.dtype.scalar)


def _extents(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """First and one-past-last address of each view (not of its storage)."""
    extents = []
    for t in tensors:
        span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        end = t.data_ptr() + (span + 1) * t.element_size() if t.numel() else t.data_ptr()
        extents.append((t.data_ptr(), end))
    return extents


def _check(pointers: Any, mask: Any, extents: list[tuple[int, int]]) -> None:
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
    size = upstream._get_np_dtype(pointers.get_element_ty()).itemsize
    inside = np.zeros(addresses.shape, bool)
    for begin, end in extents:
        inside |= (addresses >= begin) & (addresses + np.uint64(size) <= end)
    if not inside.all():
        raise IndexError(f"{int((~inside).sum())} of {inside.size} lanes are out of bounds")


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, `kernel[grid](...)` of a @triton.jit function runs in the interpreter, on the CPU."""
    extents: list[tuple[int, int]] = []
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        extents[:] = _extents([a for a in args if isinstance(a, torch.Tensor)])
        function = upstream.InterpretedFunction(kernel.fn)
        with np.errstate(all="ignore"):
            function.run(*args, grid=grid, warmup=warmup, **options)

    def call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return upstream.InterpretedFunction(function.fn).rewrite()(*args, **kwargs)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask, extents)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask, extents)
        return store(self, pointers, value, mask, *rest)

    # Functions of Triton's own library see `tl` under the name `core`.
    language = upstream._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", run)
            patch.setattr(JITFunction, "__call__", call)
            patch.setattr(Builder, "cast_impl", _cast)
            patch.setattr(Builder, "create_dot", _dot)
            patch.setattr(Builder, "binary_op", _refuse_bf16_arithmetic)
            patch.setattr(Builder, "create_masked_load", checked_load)
            patch.setattr(Builder, "create_masked_store", checked_store)
            yield
    finally:
        language.restore()
