"""From words to operands: every code at every place, by every way, gives its exact number."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from fqcompile.kernels.triton.conversion import code_factor
from fqcompile.kernels.triton.fragments import first_and_second_half, operand
from tests.kernels.triton.oracle import (
    BF16,
    CONVERSIONS,
    FP16,
    NARROW,
    every_format,
    levels_of,
    on_every_device,
    running,
)
from tests.kernels.triton.test_layout import columns, every_kwidth, found_at, placed

WIDTHS = (16, 32, 64, 128)
FACTORS = {FP16: 512.0, BF16: 64.0}


@triton.jit
def _operand_kernel(
    words_ptr,
    out_ptr,
    factor_ptr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    KWIDTH: tl.constexpr,
    CONVERSION: tl.constexpr,
):
    """out [ROWS, WIDTH] from words [ROWS, 4, CHUNKS]."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.arange(0, ROWS)[:, None]
    words = tl.load(words_ptr + rows * (4 * CHUNKS) + tl.arange(0, 4 * CHUNKS)[None, :])
    words = tl.reshape(words, (ROWS, 4, CHUNKS))
    w = operand(words, WIDTH, BITS, LEVELS, KWIDTH, DTYPE, CONVERSION)
    FACTOR: tl.constexpr = code_factor(DTYPE, LEVELS, CONVERSION)
    tl.store(factor_ptr, FACTOR)
    tl.store(out_ptr + rows * WIDTH + tl.arange(0, WIDTH)[None, :], w)


@triton.jit
def _halves_kernel(
    words_ptr,
    first_ptr,
    second_ptr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Of words [16, 4, CHUNKS], as many as the results have."""
    PARTS: tl.constexpr = CHUNKS // 2 if CHUNKS > 1 else 1
    rows = tl.arange(0, 16)[:, None]
    words = tl.load(words_ptr + rows * (4 * CHUNKS) + tl.arange(0, 4 * CHUNKS)[None, :])
    words = tl.reshape(words, (16, 4, CHUNKS))
    first, second = first_and_second_half(words, WIDTH, BITS, LEVELS)
    offs = rows * (4 * PARTS) + tl.arange(0, 4 * PARTS)[None, :]
    tl.store(first_ptr + offs, tl.reshape(first, (16, 4 * PARTS)))
    tl.store(second_ptr + offs, tl.reshape(second, (16, 4 * PARTS)))


def words_of_every_code(bits: int, levels: str, chunks: int) -> torch.Tensor:
    """int32 [16 or 256, 4, chunks]: down the rows each place has every code once, in some order."""
    words = torch.zeros(2**bits, 4, chunks, dtype=torch.int64)
    for t, c, place in product(range(4), range(chunks), range(32 // bits)):
        codes = torch.randperm(2**bits) - 2 ** (bits - 1)
        words[:, t, c] |= placed(codes, place, bits, levels)
    return words.to(torch.int32)


def codes_by_column(
    words: torch.Tensor, width: int, bits: int, levels: str, kwidth: int
) -> torch.Tensor:
    """int64 [rows, width] by the layout's docstring; chunks from the left are those of `width`."""
    codes = torch.full((words.shape[0], width), 99)
    for (word, place), column in columns(bits, levels, kwidth).items():
        if column < width:
            block, t, c = word // 16, word // 4 % 4, word % 4
            codes[:, column] = found_at(words[:, t, block * 4 + c], place, bits, levels)
    return codes


def wanted(words: torch.Tensor, width: int, bits: int, levels: str, kwidth: int) -> torch.Tensor:
    return levels_of(codes_by_column(words, width, bits, levels, kwidth), bits, levels)


def of_factor(levels: str, dtype: torch.dtype, conversion: str) -> float:
    """Normal levels are integers before they are divided by 16."""
    whole = 1.0 if conversion == "exponent" else FACTORS[dtype]
    return whole / 16 if levels == "normal" else whole


def run_operand(
    words: torch.Tensor, width: int, bits: int, levels: str, kwidth: int, dtype: torch.dtype,
    conversion: str, device: str,
) -> tuple[torch.Tensor, float]:  # fmt: skip
    rows, _, chunks = words.shape
    with running(device) as memory:
        out = torch.empty(rows, width, dtype=dtype, device=device)
        factor = torch.empty(1, device=device)
        _operand_kernel[(1,)](
            words.to(device), out, factor, rows, chunks, width, bits, levels, kwidth, conversion
        )
        assert memory is None or memory.unwritten(out) == 0
    return out.cpu(), factor.item()


@on_every_device
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@every_kwidth
@every_format
def test_operand_is_exact_for_every_code_at_every_place(
    bits: int,
    levels: str,
    kwidth: int,
    width: int,
    dtype: torch.dtype,
    conversion: str,
    device: str,
) -> None:
    words = words_of_every_code(bits, levels, max(1, width * bits // 128))
    out, factor = run_operand(words, width, bits, levels, kwidth, dtype, conversion, device)
    assert factor == of_factor(levels, dtype, conversion)
    assert torch.equal(out.double() * factor, wanted(words, width, bits, levels, kwidth))


@on_every_device
@every_format
@pytest.mark.parametrize("width", [32, 64, 128])
def test_halves_are_the_words_of_the_first_and_second_half(
    width: int, bits: int, levels: str, device: str
) -> None:
    """As operands, whatever is left in the bits that they do not read."""
    chunks = width * bits // 128
    words = words_of_every_code(bits, levels, chunks)[:16]
    halves = [
        torch.empty(16, 4, max(1, chunks // 2), dtype=torch.int32, device=device) for _ in range(2)
    ]
    with running(device):
        _halves_kernel[(1,)](words.to(device), *halves, chunks, width, bits, levels)
    parts = [codes_by_column(half.cpu(), width // 2, bits, levels, 2) for half in halves]
    assert torch.equal(torch.cat(parts, dim=1), codes_by_column(words, width, bits, levels, 2))


@on_every_device
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_last_sixteen_columns_leave_the_others_alone(
    dtype: torch.dtype, conversion: str, device: str
) -> None:
    """16 columns of int4 are half of each word: the other half is anything, its sign as well."""
    for levels, read in (("uniform", 0x00FF00FF), ("normal", 0x7777 | 0x80808080)):
        words, unread = words_of_every_code(4, levels, 1), ~read | -(1 << 32)
        for left in (words, words & ~unread, words | unread):
            got, factor = run_operand(left.int(), 16, 4, levels, 2, dtype, conversion, device)
            assert torch.equal(got.double() * factor, wanted(words, 16, 4, levels, 2))
