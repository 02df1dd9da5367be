"""The PTX instructions that kernels spell out, for Triton's interpreter.

    prmt.b32 d, a, b, selector    byte i of d is byte s of {b, a}: s = 0-3 are a's, 4-7 are b's,
                                  s being the lower three bits of the selector's nibble i
    mov.b32 d, a                  a
    and.b32 d, a, b               a & b
    fma.rn.bf16x2 d, a, b, c      a * b + c of the halves, each rounded once; .f16x2 the same
    prefetch.global.L2 [a]        asks the L2 cache for the line at address a; there is no result

The fourth bit of a nibble asks for the byte's sign in all eight bits. An operand is a number, or
the name of a register.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton.language as tl

from tests.kernels.triton.interpreter import ARGUMENT, CheckedBuilder
from tests.kernels.triton.interpreter_numbers import Handle, multiply_add_to_odd, rounded, values

_STATEMENT = re.compile(r"(\.reg \.b32|[a-z][a-z0-9.]*) ([^;{}]+);")


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """uint32 from uint32."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(both.shape, np.uint64)
    for place in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * place) & np.uint64(0xF)
        byte = both >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(0xFF)
        sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
        byte = np.where(nibble & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * place)
    return result.astype(np.uint32)


def _fma(dtype: Any, *words: np.ndarray) -> np.ndarray:
    kind = np.float16 if dtype == tl.float16 else np.uint16
    halves = [np.ascontiguousarray(word).view(kind) for word in words]
    exact = multiply_add_to_odd(*(values(Handle(half, dtype)) for half in halves))
    return rounded(exact, dtype).data.view(np.uint32)


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "prmt.b32": prmt,
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "fma.rn.bf16x2": lambda a, b, c: _fma(tl.bfloat16, a, b, c),
    "fma.rn.f16x2": lambda a, b, c: _fma(tl.float16, a, b, c),
}


def _run(asm: str, registers: dict[str, np.ndarray], like: np.ndarray) -> None:
    """Changes the registers as the statements say."""
    if _STATEMENT.sub("", asm).strip(" {}"):
        raise NotImplementedError(f"{asm!r} is not emulated")
    for instruction, operands in _STATEMENT.findall(asm):
        result, *sources = operands.split(", ")
        if instruction == ".reg .b32":
            continue
        if instruction not in _INSTRUCTIONS:
            raise NotImplementedError(f"{instruction!r} is not emulated")
        words = [registers[x] if x in registers else np.full_like(like, int(x, 0)) for x in sources]
        registers[result] = _INSTRUCTIONS[instruction](*words)


def _create_inline_asm(
    self: Any, asm: str, constraints: str, inputs: Any, types: Any, is_pure: bool, pack: int
) -> Any:
    if asm.startswith("prefetch.global.L2 [$1];") and constraints == "=r,l":
        (pointers,) = inputs
        self.memory.prefetch(pointers.data.astype(np.uint64).ravel(), pointers.attr.get(ARGUMENT))
        zeros = Handle(np.zeros(pointers.data.shape, np.int32), tl.int32)
        return SimpleNamespace(get_result=lambda index: zeros)
    count = len(types)
    wanted = ["=r"] * count + ["r"] * len(inputs)
    # "&": written before all inputs are read, which only the compiler has to know.
    if constraints.replace("&", "").split(",") != wanted or pack != 1:
        raise NotImplementedError(f"{asm!r} ({constraints}, pack={pack}) is not emulated")
    words = np.broadcast_arrays(*(value.data.view(np.uint32) for value in inputs))
    registers = {f"${i}": word for i, word in enumerate(words, count)}
    _run(asm, registers, words[0])
    results = [
        Handle(registers[f"${i}"].view(np.int32), inputs[0].dtype.scalar) for i in range(count)
    ]
    return SimpleNamespace(get_result=results.__getitem__)


@contextmanager
def emulated_ptx() -> Iterator[None]:
    """Inside, interpreted kernels may use `tl.inline_asm_elementwise` of these instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedBuilder, "create_inline_asm", _create_inline_asm)
        yield
