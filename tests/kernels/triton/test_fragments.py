"""From words to operands: every code at every place, by every way, gives its exact number."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from fqcompile.kernels.triton.fragments import code_factor, first_and_second_half, operand
from tests.kernels.triton.oracle import BF16, CONVERSIONS, FP16, NARROW, on_every_device, running
from tests.kernels.triton.test_layout import columns

WIDTHS = (16, 32, 64, 128)
FACTORS = {FP16: 512.0, BF16: 64.0}
every_format = pytest.mark.parametrize(("bits", "kwidth"), list(product((4, 8), (2, 4))))


@triton.jit
def _operand_kernel(
    words_ptr,
    out_ptr,
    factor_ptr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    KWIDTH: tl.constexpr,
    CONVERSION: tl.constexpr,
):
    """out [ROWS, WIDTH] from words [ROWS, 4, CHUNKS]."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.arange(0, ROWS)[:, None]
    words = tl.load(words_ptr + rows * (4 * CHUNKS) + tl.arange(0, 4 * CHUNKS)[None, :])
    w = operand(tl.reshape(words, (ROWS, 4, CHUNKS)), WIDTH, BITS, KWIDTH, DTYPE, CONVERSION)
    FACTOR: tl.constexpr = code_factor(DTYPE, CONVERSION)
    tl.store(factor_ptr, FACTOR)
    tl.store(out_ptr + rows * WIDTH + tl.arange(0, WIDTH)[None, :], w)


@triton.jit
def _halves_kernel(
    words_ptr, first_ptr, second_ptr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr
):
    """Of words [16, 4, CHUNKS], as many as the results have."""
    PARTS: tl.constexpr = CHUNKS // 2 if CHUNKS > 1 else 1
    rows = tl.arange(0, 16)[:, None]
    words = tl.load(words_ptr + rows * (4 * CHUNKS) + tl.arange(0, 4 * CHUNKS)[None, :])
    words = tl.reshape(words, (16, 4, CHUNKS))
    first, second = first_and_second_half(words, WIDTH, BITS)
    offs = rows * (4 * PARTS) + tl.arange(0, 4 * PARTS)[None, :]
    tl.store(first_ptr + offs, tl.reshape(first, (16, 4 * PARTS)))
    tl.store(second_ptr + offs, tl.reshape(second, (16, 4 * PARTS)))


def words_of_every_code(bits: int, chunks: int) -> torch.Tensor:
    """int32 [16 or 256, 4, chunks]: down the rows each place has every code once, in some order."""
    words = torch.zeros(2**bits, 4, chunks, dtype=torch.int64)
    for t, c, place in product(range(4), range(chunks), range(32 // bits)):
        words[:, t, c] |= torch.randperm(2**bits) << (bits * place)
    return words.to(torch.int32)


def codes_by_column(words: torch.Tensor, width: int, bits: int, kwidth: int) -> torch.Tensor:
    """int64 [rows, width] by the layout's docstring; chunks from the left are those of `width`."""
    codes = torch.full((words.shape[0], width), 99)
    for (word, place), column in columns(bits, kwidth).items():
        if column < width:
            block, t, c = word // 16, word // 4 % 4, word % 4
            word_values = words[:, t, block * 4 + c].long()
            codes[:, column] = (word_values >> (bits * place)) % 2**bits - 2 ** (bits - 1)
    return codes


def run_operand(
    words: torch.Tensor, width: int, bits: int, kwidth: int, dtype: torch.dtype, conversion: str,
    device: str,
) -> tuple[torch.Tensor, float]:  # fmt: skip
    rows, _, chunks = words.shape
    with running(device) as memory:
        out = torch.empty(rows, width, dtype=dtype, device=device)
        factor = torch.empty(1, device=device)
        _operand_kernel[(1,)](
            words.to(device), out, factor, rows, chunks, width, bits, kwidth, conversion
        )
        assert memory is None or memory.unwritten(out) == 0
    return out.cpu(), factor.item()


@on_every_device
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@every_format
def test_operand_is_exact_for_every_code_at_every_place(
    bits: int, kwidth: int, width: int, dtype: torch.dtype, conversion: str, device: str
) -> None:
    words = words_of_every_code(bits, max(1, width * bits // 128))
    out, factor = run_operand(words, width, bits, kwidth, dtype, conversion, device)
    assert factor == (1.0 if conversion == "exponent" else FACTORS[dtype])
    assert torch.equal(out.double() * factor, codes_by_column(words, width, bits, kwidth).double())


@on_every_device
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_halves_are_the_words_of_the_first_and_second_half(
    width: int, bits: int, device: str
) -> None:
    """As operands, whatever is left in the bits that they do not read."""
    chunks = width * bits // 128
    words = words_of_every_code(bits, chunks)[:16]
    halves = [
        torch.empty(16, 4, max(1, chunks // 2), dtype=torch.int32, device=device) for _ in range(2)
    ]
    with running(device):
        _halves_kernel[(1,)](words.to(device), *halves, chunks, width, bits)
    got = torch.cat([codes_by_column(half.cpu(), width // 2, bits, 2) for half in halves], dim=1)
    assert torch.equal(got, codes_by_column(words, width, bits, 2))


@on_every_device
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_last_sixteen_columns_leave_the_others_alone(
    dtype: torch.dtype, conversion: str, device: str
) -> None:
    """16 columns of int4 are half of each word: the other half is anything, its sign as well."""
    words = words_of_every_code(4, 1)
    for shifted in (words >> 8, words & 0x00FF00FF, words | ~0x00FF00FF):
        out, factor = run_operand(shifted, 16, 4, 2, dtype, conversion, device)
        assert torch.equal(out.double() * factor, codes_by_column(shifted, 16, 4, 2).double())
