"""The instructions as the PTX manual has them, on values worked out by hand."""

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
    got = prmt(np.array([a], np.uint32), np.array([b], np.uint32), np.array([selector], np.uint32))
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


def test_the_selector_may_be_a_register_of_which_sixteen_bits_count() -> None:
    asm = "prmt.b32 $0, 0x33221100, 0x77665544, $1;"
    assert run(asm, 0x3210, 0xFFFF7654) == [A, B]


def test_statements_run_in_order_with_registers_of_their_own() -> None:
    asm = "{ .reg .b32 a; and.b32 a, $1, 0xFF00FF; mov.b32 $0, a; prmt.b32 $0, $0, a, 0x6240; }"
    assert run(asm, 0x12345678) == [0x34347878]


@pytest.mark.parametrize(
    ("kind", "three_halves", "want"),
    [("bf16x2", 0x3FC0, 0x4070), ("f16x2", 0x3E00, 0x4380)],
)
def test_fma_of_halves(kind: str, three_halves: int, want: int) -> None:
    """1.5 * 1.5 + 1.5 = 3.75, and 0 * 1.5 + 1.5."""
    number = f"{three_halves * 0x10001:#x}"
    assert run(f"fma.rn.{kind} $0, $1, {number}, {number};", three_halves) == [
        three_halves << 16 | want
    ]


@pytest.mark.parametrize(("kind", "scale"), [("bf16x2", 0x7F00), ("f16x2", 0x7800)])
def test_fma_keeps_subnormal_numbers(kind: str, scale: int) -> None:
    """One and -127 of the smallest, times a large power of two."""
    one = 2.0**-6 if kind == "bf16x2" else 2.0**-9
    got = run(f"fma.rn.{kind} $0, $1, {scale * 0x10001:#x}, 0;", 0x807F0001)[0]
    bits = torch.tensor([got & 0xFFFF, got >> 16]).to(torch.int16)
    dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16
    assert bits.view(dtype).tolist() == [one, -127 * one]


def test_other_instructions_are_refused() -> None:
    for asm, pack in (
        ("lop3.b32 $0, $1, 0, 0, 0xEA;", 1),
        ("@p mov.b32 $0, $1;", 1),
        ("prmt.b32 $0, $1, 0, 0x4341;", 2),
    ):
        with pytest.raises(NotImplementedError, match="is not emulated"):
            run(asm, 1, 2, pack=pack)
