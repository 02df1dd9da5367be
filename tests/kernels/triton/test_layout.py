"""The fragment layout against its own docstring, place by place, in loops."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.triton.layout import column_order, pack
from tests.kernels.triton.oracle import (
    COLUMN,
    FLOATS,
    FORMATS,
    FP16,
    GROUPS,
    UNEVEN_GROUPS,
    every_format,
    quantized,
    random_codes,
)

every_kwidth = pytest.mark.parametrize("kwidth", [2, 4])
SIGNS = (7, 15, 23, 31, 3, 11, 19, 27)  # of normal levels: the bit of each place's sign


def columns(bits: int, levels: str, kwidth: int) -> dict[tuple[int, int], int]:
    """(word, place in the word) -> column of the block, as the layout's docstring has it."""
    found = {}
    for t, c, h, p in product(range(4), range(4), range(2), range(2)):
        place = h * 8 + t * 2 + p if kwidth == 2 else t * 4 + h * 2 + p
        for part in range(2):
            if bits == 4:  # part is rep
                of_code = part * 4 + p * 2 + h if levels == "normal" else p * 4 + part * 2 + h
                found[t * 4 + c, of_code] = c * 32 + part * 16 + place
            else:  # part is b
                found[part * 16 + t * 4 + c, p * 2 + h] = part * 64 + c * 16 + place
    return found


def placed(codes: torch.Tensor, place: int, bits: int, levels: str) -> torch.Tensor:
    """int64: codes as the bits that they are at a place of a word."""
    if levels == "normal":
        pair = torch.where(codes < 0, -1 - codes, codes)
        return pair * 2 ** (4 * place) + (codes < 0) * 2 ** SIGNS[place]
    return (codes + 2 ** (bits - 1)) * 2 ** (bits * place)


def found_at(words: torch.Tensor, place: int, bits: int, levels: str) -> torch.Tensor:
    """int64: the codes at a place of these words."""
    if levels == "normal":
        pair = (words.long() >> (4 * place)) % 8
        return torch.where((words.long() >> SIGNS[place]) % 2 == 1, -1 - pair, pair)
    return (words.long() >> (bits * place)) % 2**bits - 2 ** (bits - 1)


def unpacked(qweight: torch.Tensor, bits: int, levels: str, kwidth: int) -> torch.Tensor:
    """int64 codes [rows and filling, K and filling]."""
    micro_tiles, blocks = qweight.shape[:2]
    codes = torch.full((micro_tiles, 16, blocks, 128), 99)
    for (word, place), column in columns(bits, levels, kwidth).items():
        codes[..., column] = found_at(qweight[..., word], place, bits, levels).transpose(1, 2)
    return codes.reshape(micro_tiles * 16, blocks * 128)


@every_kwidth
@every_format
def test_every_column_has_one_place(bits: int, levels: str, kwidth: int) -> None:
    order = column_order(bits, levels, kwidth)
    assert order.shape == (4 * bits, 32 // bits)
    wanted = columns(bits, levels, kwidth)
    assert sorted(order.flatten().tolist()) == list(range(128))
    assert {(w, i): int(order[w, i]) for w, i in wanted} == wanted


def test_the_first_words_by_hand() -> None:
    """Thread t begins with columns 2 t and 2 t + 1 (kwidth 2) or 4 t and 4 t + 1 (kwidth 4)."""
    assert column_order(4, "uniform", 2)[0].tolist() == [0, 8, 16, 24, 1, 9, 17, 25]
    assert column_order(4, "uniform", 2)[4].tolist() == [2, 10, 18, 26, 3, 11, 19, 27]
    assert column_order(4, "uniform", 2)[1].tolist() == [32, 40, 48, 56, 33, 41, 49, 57]
    assert column_order(8, "uniform", 2)[0].tolist() == [0, 8, 1, 9]
    assert column_order(8, "uniform", 2)[21].tolist() == [64 + 18, 64 + 26, 64 + 19, 64 + 27]
    assert column_order(4, "uniform", 4)[4].tolist() == [4, 6, 20, 22, 5, 7, 21, 23]
    assert column_order(8, "uniform", 4)[0].tolist() == [0, 2, 1, 3]
    assert column_order(4, "normal", 2)[0].tolist() == [0, 8, 1, 9, 16, 24, 17, 25]
    assert column_order(4, "normal", 4)[4].tolist() == [4, 6, 5, 7, 20, 22, 21, 23]


def test_a_word_of_normal_levels_by_hand() -> None:
    """Its columns are 0, 8, 1, 9, 16, ...: pairs are in nibbles, signs in bits between them."""
    codes = torch.zeros(16, 128, dtype=torch.int8)
    codes[0, [0, 8, 1, 9]] = torch.tensor([1, -1, 7, -8], dtype=torch.int8)
    codes[0, [16, 24, 17, 25]] = torch.tensor([-3, 0, -8, 5], dtype=torch.int8)
    words, _ = pack(quantized(codes, torch.ones(16, 1), 4, 128, "normal"), 2)
    pairs, signs = 0x57027701, 0x80 << 8 | 0x80 << 24 | 0x08 | 0x08 << 16
    assert words[0, 0, 0, 0].item() & 0xFFFFFFFF == pairs | signs
    assert words[0, 0, 0, 1].item() == 0


@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 400),
    form=st.sampled_from(FORMATS),
    kwidth=st.sampled_from([2, 4]),
    seed=st.integers(0, 99),
)
def test_codes_come_back_and_the_rest_is_zero(
    rows: int, k: int, form: tuple[int, str], kwidth: int, seed: int
) -> None:
    """What rows and K are filled up with has code 0, whose level is 0."""
    torch.manual_seed(seed)
    bits, levels = form
    codes = random_codes(bits, rows, k)
    qweight, _ = pack(quantized(codes, torch.ones(rows, 1), bits, COLUMN, levels), kwidth)
    assert qweight.dtype == torch.int32
    assert qweight.is_contiguous()
    assert qweight.shape == (-(-rows // 16), -(-k // 128), 16, 4 * bits)
    back = unpacked(qweight, bits, levels, kwidth)
    assert torch.equal(back[:rows, :k], codes.long())
    assert not back[rows:].any()
    assert not back[:, k:].any()


@every_kwidth
@every_format
def test_every_code_comes_back_from_every_place(bits: int, levels: str, kwidth: int) -> None:
    """Row r has the code r at column 0, and the following ones after it."""
    half = 2 ** (bits - 1)
    codes = (torch.arange(2 * half)[:, None] + torch.arange(128)) % (2 * half) - half
    weight = quantized(codes.to(torch.int8), torch.ones(2 * half, 1), bits, 128, levels)
    assert torch.equal(unpacked(pack(weight, kwidth)[0], bits, levels, kwidth), codes)


def dot_width(group_size: int) -> int:
    """The widest of 16 .. 128 that divides the group."""
    return max(width for width in (16, 32, 64, 128) if group_size % width == 0)


def assert_scales(scale: torch.Tensor, packed: torch.Tensor, group_size: int, k: int) -> None:
    """One run of rows for each group of whole blocks, else for each block; in it one for a dot."""
    rows, filled = scale.shape[0], -(-scale.shape[0] // 256) * 256
    assert (packed.dtype, packed.is_contiguous()) == (scale.dtype, True)
    if group_size >= k or group_size % 128 == 0:
        assert packed.shape == (scale.shape[1], filled, 1)
        assert torch.equal(packed[:, :rows, 0], scale.T)
    else:
        width = dot_width(group_size)
        assert packed.shape == (-(-k // 128), filled, 128 // width)
        for block, dot in product(range(packed.shape[0]), range(packed.shape[2])):
            column = block * 128 + dot * width
            if column < k:
                want = scale[:, column // group_size]
                assert torch.equal(packed[block, :rows, dot], want), (block, dot)
    assert not packed[:, rows:].any()


@pytest.mark.parametrize("k", [512, 700, 129, 100])
@pytest.mark.parametrize("group_size", [*GROUPS, *UNEVEN_GROUPS])
@pytest.mark.parametrize("rows", [1, 256, 257])
def test_scales_are_where_the_docstring_says(rows: int, group_size: int, k: int) -> None:
    scale = torch.randn(rows, -(-k // group_size)).half()
    weight = quantized(torch.zeros(rows, k, dtype=torch.int8), scale, 4, group_size)
    assert_scales(scale, pack(weight, 2)[1], group_size, k)


@given(
    rows=st.integers(1, 300),
    k=st.integers(1, 700),
    group_size=st.integers(1, 24).map(lambda i: 16 * i),
    dtype=st.sampled_from(FLOATS),
)
def test_scales_are_there_for_any_shape(
    rows: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    scale = torch.randn(rows, -(-k // group_size)).to(dtype)
    weight = quantized(torch.zeros(rows, k, dtype=torch.int8), scale, 8, group_size)
    assert_scales(scale, pack(weight, 4)[1], group_size, k)


@pytest.mark.parametrize(
    ("bits", "group_size", "code_bytes", "scale_bytes"),
    [
        (4, 128, 304 * 768 // 2, 2 * 6 * 512),
        (8, 128, 304 * 768, 2 * 6 * 512),
        (4, 32, 304 * 768 // 2, 2 * 6 * 4 * 512),
        (4, 48, 304 * 768 // 2, 2 * 6 * 8 * 512),
        (4, 256, 304 * 768 // 2, 2 * 3 * 512),
        (8, COLUMN, 304 * 768, 2 * 512),
    ],
)
def test_bytes_are_those_of_the_filled_matrix(
    bits: int, group_size: int, code_bytes: int, scale_bytes: int
) -> None:
    """300 x 700: codes of 304 x 768, and scales of 512 rows."""
    scale = torch.ones(300, -(-700 // group_size), dtype=FP16)
    weight = quantized(random_codes(bits, 300, 700), scale, bits, group_size)
    assert [t.nbytes for t in pack(weight, 2)] == [code_bytes, scale_bytes]


@pytest.mark.parametrize(("rows", "k", "group_size"), [(0, 256, 64), (0, 256, 256)])
def test_nothing_is_packed_into_nothing(rows: int, k: int, group_size: int) -> None:
    codes = torch.zeros(rows, k, dtype=torch.int8)
    scale = torch.ones(rows, -(-k // group_size))
    words, scale = pack(quantized(codes, scale, 8, group_size), 2)
    assert words.numel() == 0
    assert scale.shape[1] == -(-rows // 256) * 256
