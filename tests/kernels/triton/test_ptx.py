"""`prmt.b32` as the PTX manual has it, on values worked out by hand."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.ptx import emulated_ptx, prmt

A, B = 0x33221100, 0x77665544


@pytest.mark.parametrize(
    ("a", "b", "selector", "want"),
    [
        (A, B, 0x3210, A),
        (A, B, 0x7654, B),
        (A, B, 0x0123, 0x00112233),
        (A, B, 0x5410, 0x55441100),
        (A, B, 0x2752, 0x22775522),
        (A, B, 0x0000, 0x00000000),
        (A, B, 0x1111, 0x11111111),
        (A, 0, 0x4341, 0x00330011),
        (0xFEDCBA98, 0, 0x4341, 0x00FE00BA),
        (0x80FF7F01, 0, 0xBA98, 0xFFFF0000),
        (0x80FF7F01, 0x800000FF, 0x3F1C, 0x80FF7FFF),
    ],
)
def test_prmt_picks_bytes(a: int, b: int, selector: int, want: int) -> None:
    got = prmt(np.array([a], np.uint32), np.array([b], np.uint32), selector)
    assert f"{got[0]:#010x}" == f"{want:#010x}"


@triton.jit
def _asm_kernel(x_ptr, y_ptr, ASM: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=PACK)
    tl.store(y_ptr + offs, y)


def run(asm: str, *words: int, pack: int = 1) -> list[int]:
    x = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    y = torch.empty_like(x)
    with interpreted(), emulated_ptx():
        _asm_kernel[(1,)](x, y, asm, pack, len(words))
    return [word & 0xFFFFFFFF for word in y.tolist()]


def test_a_kernel_runs_prmt_on_every_element() -> None:
    words = (0xFEDCBA98, 0x33221100)
    assert run("prmt.b32 $0, $1, 0, 0x4341;", *words) == [0x00FE00BA, 0x00330011]
    assert run("prmt.b32 $0, 0xAABBCCDD, $1, 0x5140;", *words) == [0xBACC98DD, 0x11CC00DD]


def test_other_instructions_are_refused() -> None:
    for asm, pack in (("lop3.b32 $0, $1, 0, 0, 0xEA;", 1), ("prmt.b32 $0, $1, 0, 0x4341;", 2)):
        with pytest.raises(NotImplementedError, match="is not emulated"):
            run(asm, 1, 2, pack=pack)
