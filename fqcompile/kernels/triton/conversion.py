"""From codes in words to levels in fp16 or bf16, without leaving the registers.

The bits 0-7 of a bf16, or 0-10 of an fp16, count in equal steps across the border of the subnormal
numbers, so a masked word already is two small numbers, code * 2^-133 or code * 2^-24. One fma each
scales them and takes the offset away: (code - offset) / code_factor, exact. ("subnormal")

Shifting bytes down makes the compiler treat the halves of a word apart, which doubles the
instructions for int8; one `prmt` in PTX does not. ("subnormal_prmt", NVIDIA alone)

Where a GPU flushes those numbers, the exponent of 128 or 1024 is put before the code and that
number subtracted again: the same value by more instructions. ("exponent")

Normal levels are a center plus or minus one of eight numbers. One `prmt` looks up the numbers of
four codes, with the words' bits as they are for its selector; one more for each pair of codes puts
number and sign into each half of a word, a small number again, and the fma adds the center.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import struct

import triton
import triton.language as tl

from fqcompile.tensor.format import NORMAL4

_LEVELS = tuple(round(16 * value) for value in NORMAL4.values)
_CENTER = (_LEVELS[7] + _LEVELS[8]) // 2
_NUMBERS = bytes(level - _CENTER for level in _LEVELS[8:])
assert all(low + high == 2 * _CENTER for low, high in zip(_LEVELS, _LEVELS[::-1], strict=True)), (
    f"the normal levels {_LEVELS} are not in pairs around {_CENTER}, which kernels rely on"
)
CENTER = tl.constexpr(_CENTER)
NUMBERS = tl.constexpr(int.from_bytes(_NUMBERS, "little"))


def _look_up(kind: str, scale: int, offset: int) -> tl.constexpr:
    """PTX that makes two words, each of two levels, of four numbers' places ($2) and signs ($3).

    kind: of the numbers. scale, offset: of the fma, as bits.
    """
    low, high = (int.from_bytes(half, "little") for half in (_NUMBERS[:4], _NUMBERS[4:]))
    return tl.constexpr(
        "{ .reg .b32 numbers, signs, scale, offset; "
        f"mov.b32 scale, {scale * 0x10001:#x}; "
        f"mov.b32 offset, {offset * 0x10001:#x}; "
        f"prmt.b32 numbers, {low:#x}, {high:#x}, $2; "
        "and.b32 signs, $3, 0x80808080; "
        "prmt.b32 $0, numbers, signs, 0x6240; "
        "prmt.b32 $1, numbers, signs, 0x7351; "
        f"fma.rn.{kind} $0, $0, scale, offset; "
        f"fma.rn.{kind} $1, $1, scale, offset; }}"
    )


def _bf16_bits(value: float) -> int:
    return int.from_bytes(struct.pack(">f", value)[:2], "big")


def _fp16_bits(value: float) -> int:
    return int.from_bytes(struct.pack(">e", value), "big")


LOOK_UP_BF16 = _look_up("bf16x2", _bf16_bits(2.0**127), _bf16_bits(_CENTER / 2**6))
LOOK_UP_FP16 = _look_up("f16x2", _fp16_bits(2.0**15), _fp16_bits(_CENTER / 2**9))


@triton.jit
def code_factor(DTYPE: tl.constexpr, LEVELS: tl.constexpr, CONVERSION: tl.constexpr):
    """What a dot's result is to be multiplied with."""
    OF_ONE: tl.constexpr = (
        1.0 if CONVERSION == "exponent" else (2.0**6 if DTYPE == tl.bfloat16 else 2.0**9)
    )
    FACTOR: tl.constexpr = OF_ONE / 16 if LEVELS == "normal" else OF_ONE
    return FACTOR


@triton.jit
def halves(v, DTYPE: tl.constexpr):
    return v.to(tl.int16).to(DTYPE, bitcast=True), (v >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _scaled(v, SCALE: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """The two numbers in each word times SCALE plus OFFSET, as a last dimension of 2."""
    low, high = halves(v, DTYPE)
    scale = tl.full(low.shape, SCALE, DTYPE)
    offset = tl.full(low.shape, OFFSET, DTYPE)
    return tl.join(tl.fma(low, scale, offset), tl.fma(high, scale, offset))


@triton.jit
def _nibbles(v, SECOND: tl.constexpr, DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """Codes - 8 of the first or second nibble of each half word."""
    if CONVERSION != "exponent":
        LEAST: tl.constexpr = 2.0**127 if DTYPE == tl.bfloat16 else 2.0**15
        OFFSET: tl.constexpr = -8 * 2.0**-6 if DTYPE == tl.bfloat16 else -8 * 2.0**-9
        if SECOND:
            numbers = _scaled(v & 0x00F000F0, LEAST / 16, OFFSET, DTYPE)
        else:
            numbers = _scaled(v & 0x000F000F, LEAST, OFFSET, DTYPE)
    else:
        if SECOND:
            v = v >> 4
        if DTYPE == tl.bfloat16:
            numbers = _scaled((v & 0x000F000F) | 0x43004300, 1.0, -136.0, DTYPE)
        else:
            numbers = _scaled((v & 0x000F000F) | 0x64006400, 1.0, -1032.0, DTYPE)
    return numbers


@triton.jit
def _numbers(places):
    """Four bytes, each the number of a pair, whose place is in three of four bits."""
    table = tl.full(places.shape, NUMBERS, tl.int64)
    numbers = tl.zeros_like(places)
    for i in tl.static_range(4):
        place = (places >> (4 * i)) & 7
        numbers |= ((table >> (place * 8).to(tl.int64)).to(tl.int32) & 0xFF) << (8 * i)
    return numbers


@triton.jit
def _signed(v, DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """Levels times 16 of the number and sign in each half word, as a last dimension of 2."""
    if CONVERSION == "subnormal":
        if DTYPE == tl.bfloat16:
            numbers = _scaled(v, 2.0**127, CENTER * 2.0**-6, DTYPE)
        else:
            numbers = _scaled(v, 2.0**15, CENTER * 2.0**-9, DTYPE)
    else:
        both = tl.join(v.to(tl.int16), (v >> 16).to(tl.int16))
        number = (both & 0xFF).to(tl.float32)
        numbers = tl.where(both < 0, CENTER - number, CENTER + number).to(DTYPE)
    return numbers


@triton.jit
def normal_levels(places, signs, DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """Of four codes, as last dimensions p and h."""
    if CONVERSION == "subnormal_prmt":
        LOOK_UP: tl.constexpr = LOOK_UP_BF16 if DTYPE == tl.bfloat16 else LOOK_UP_FP16
        first, second = tl.inline_asm_elementwise(
            LOOK_UP, "=&r,=&r,r,r", [places, signs], (tl.int32, tl.int32), is_pure=True, pack=1
        )
        low, high = halves(first, DTYPE)
        second_low, second_high = halves(second, DTYPE)
        levels = tl.join(tl.join(low, high), tl.join(second_low, second_high))
    else:
        numbers = _numbers(places)
        first = (numbers & 0x00FF00FF) | ((signs & 0x00800080) << 8)
        second = ((numbers >> 8) & 0x00FF00FF) | (signs & -0x7FFF8000)
        levels = tl.join(_signed(first, DTYPE, CONVERSION), _signed(second, DTYPE, CONVERSION))
    return levels


@triton.jit
def uniform_levels(words, DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """Of the four codes in the first two nibbles of each half word, as dimensions p and h."""
    return tl.join(
        _nibbles(words, False, DTYPE, CONVERSION), _nibbles(words, True, DTYPE, CONVERSION)
    )


@triton.jit
def second_bytes(v, CONVERSION: tl.constexpr):
    """v >> 8 as far as `first_bytes` reads it."""
    if CONVERSION == "subnormal_prmt":
        second = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        second = v >> 8
    return second


@triton.jit
def first_bytes(v, DTYPE: tl.constexpr, CONVERSION: tl.constexpr):
    """Codes - 128 of the first byte of each half word."""
    if CONVERSION != "exponent":
        if DTYPE == tl.bfloat16:
            numbers = _scaled(v & 0x00FF00FF, 2.0**127, -128 * 2.0**-6, DTYPE)
        else:
            numbers = _scaled(v & 0x00FF00FF, 2.0**15, -128 * 2.0**-9, DTYPE)
    else:
        if DTYPE == tl.bfloat16:
            # Eight bits do not fit behind 128: 16 * (high nibble - 8) + low nibble.
            low = _scaled((v & 0x000F000F) | 0x43004300, 1.0, -128.0, DTYPE)
            high = _scaled(((v >> 4) & 0x000F000F) | 0x43004300, 1.0, -136.0, DTYPE)
            numbers = tl.fma(high, tl.full(high.shape, 16.0, DTYPE), low)
        else:
            numbers = _scaled((v & 0x00FF00FF) | 0x64006400, 1.0, -1152.0, DTYPE)
    return numbers
