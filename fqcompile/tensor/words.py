"""Codes [N, K] in 32-bit words, as compressed-tensors packs them, from the plain layout and back.

    int4: bits 4j .. 4j+3 of a word are code j + 8          bytes: (c0+8) | (c1+8) << 4, ...
    int8: bits 8j .. 8j+7 of a word are code j + 128        bytes: c0 + 128, c1 + 128, ...

Words are little-endian, so int4 codes of the plain layout are words already; int8 codes differ in
their highest bit. A row is filled up to whole words with bits of zero.
"""

import sys
from dataclasses import replace

import torch
from torch.nn.functional import pad

from fqcompile.tensor.codes import unpack
from fqcompile.tensor.format import INT4, INT8, QTYPES, UNIFORM, packed_columns
from fqcompile.tensor.quantized import QuantizedTensor

WORD_BITS = 32
_OFFSET = 0x80  # of int8 codes


def words_per_row(bits: int, k: int) -> int:
    """32-bit words in a row of K codes."""
    return -(-k * bits // WORD_BITS)


def to_words(qweight: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Plain storage [N, packed_columns] -> int32 [N, words_per_row]."""
    _check_byte_order()
    data = qweight.view(torch.uint8)
    if bits == INT8.bits:
        data = data ^ _OFFSET
    elif k % 2:  # the plain layout fills up with code 0
        data = data.clone()
        data[:, -1] &= 0x0F
    missing = 4 * words_per_row(bits, k) - data.shape[1]
    return pad(data, (0, missing)).contiguous().view(torch.int32)


def from_words(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """int32 [N, words_per_row] -> plain storage [N, packed_columns]."""
    _check_byte_order()
    qtype = QTYPES[bits, UNIFORM]
    data = words.contiguous().view(torch.uint8)[:, : packed_columns(qtype, k)]
    if qtype is INT8:
        return (data ^ _OFFSET).view(torch.int8)
    data = data.contiguous()
    if k % 2:
        data[:, -1] = data[:, -1] & 0x0F | (-INT4.qmin) << 4
    return data


def widen(weight: QuantizedTensor) -> QuantizedTensor:
    """The same values with their int4 codes stored as int8 codes; levels must be uniform."""
    assert weight.format.levels == UNIFORM, "other levels are no int8 codes"
    if weight.bits == INT8.bits:
        return weight
    codes = unpack(weight.qweight, weight.format.qtype, weight.k).contiguous()
    return replace(weight, qweight=codes).changed(bits=INT8.bits)


def _check_byte_order() -> None:
    assert sys.byteorder == "little", (
        "words are views of bytes, which needs a little-endian machine"
    )
