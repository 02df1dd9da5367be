"""The one PTX instruction that kernels spell out, `prmt.b32`, for Triton's interpreter.

    prmt.b32 d, a, b, selector    byte i of d is byte s of {b, a}: s = 0-3 are a's, 4-7 are b's,
                                  s being the lower three bits of the selector's nibble i

The fourth bit of a nibble asks for the byte's sign in all eight bits.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.interpreter import CheckedBuilder
from tests.kernels.triton.interpreter_numbers import Handle

_INSTRUCTION = re.compile(r"prmt\.b32 \$0, (\S+), (\S+), (\S+);")


def prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """uint32 from uint32."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(both.shape, np.uint64)
    for place in range(4):
        nibble = selector >> (4 * place) & 0xF
        byte = both >> np.uint64(8 * (nibble & 7)) & np.uint64(0xFF)
        if nibble & 8:
            byte = (byte >> np.uint64(7)) * np.uint64(0xFF)
        result |= byte << np.uint64(8 * place)
    return result.astype(np.uint32)


def _create_inline_asm(
    self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
) -> Any:
    match = _INSTRUCTION.fullmatch(asm)
    registers = ["=r"] + ["r"] * len(values)
    if match is None or constraints.split(",") != registers or pack != 1 or len(types) != 1:
        raise NotImplementedError(f"{asm!r} ({constraints}, pack={pack}) is not emulated")
    registers_of = {f"${i}": value.data.view(np.uint32) for i, value in enumerate(values, 1)}
    a, b, selector = match.groups()
    words = [registers_of[x] if x in registers_of else np.uint32(int(x, 0)) for x in (a, b)]
    result = prmt(*np.broadcast_arrays(*words), int(selector, 0))
    handle = Handle(result.view(np.int32), values[0].dtype.scalar)
    return SimpleNamespace(get_result=lambda i: (handle,)[i])


@contextmanager
def emulated_ptx() -> Iterator[None]:
    """Inside, interpreted kernels may use `tl.inline_asm_elementwise` for `prmt.b32`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedBuilder, "create_inline_asm", _create_inline_asm)
        yield
