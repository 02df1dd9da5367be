"""Codes: pack [N, K] codes into the plain layout, unpack them exactly, and dequantize them.

int8: byte k of a row is code k
int4: byte j of a row is (code[2j] + 8) | (code[2j+1] + 8) << 4; an odd K is padded with code 0
"""

from functools import lru_cache

import torch
from torch.nn.functional import pad

from fqcompile.tensor.chunks import group_parts, plain_tensors, row_chunks
from fqcompile.tensor.format import QType

# Dequantizing keeps few copies of a piece, so longer ones fit the cache.
_DEQUANTIZE_SHARE = 4.0


def pack(codes: torch.Tensor, qtype: QType) -> torch.Tensor:
    """int8 codes [N, K] -> storage [N, packed_columns]."""
    if qtype.codes_per_byte == 1:
        return codes.contiguous()
    padded = pad(codes, (0, codes.shape[1] % 2)) if codes.shape[1] % 2 else codes
    nibbles = (padded.contiguous() - qtype.qmin).view(torch.int16)  # 0x0H0L, little-endian
    return (nibbles | (nibbles >> 4)).bitwise_and_(0xFF).to(qtype.storage_dtype)


def unpack(qweight: torch.Tensor, qtype: QType, k: int) -> torch.Tensor:
    """Storage [N, packed_columns] -> int8 codes [N, K]."""
    if qtype.codes_per_byte == 1:
        return qweight
    # 0x00HL -> 0x0H0L: both codes of a byte in one operation
    pairs = qweight.to(torch.int16, memory_format=torch.contiguous_format)
    nibbles = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.int8)
    return nibbles.add_(qtype.qmin)[:, :k]


def dequantize_rows(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    qtype: QType,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Storage [N, packed_columns] and scales [N, G] -> level * scale [N, K] in `dtype`.

    A product of two types is formed in the wider one and rounded once.
    """
    values = torch.empty(qweight.shape[0], k, dtype=dtype, device=qweight.device)
    for rows in row_chunks(values, _DEQUANTIZE_SHARE):
        out = values[rows]
        out.copy_(_levels(qweight[rows], qtype, dtype)[:, :k])
        for part, s in group_parts(out, scale[rows], group_size):
            part.mul_(s)
    return values


def _levels(qweight: torch.Tensor, qtype: QType, dtype: torch.dtype) -> torch.Tensor:
    """The levels of all codes; in `dtype` or in a type that holds them exactly."""
    if qtype.codes_per_byte == 1:
        return qweight
    pairs = _levels_of_bytes(qtype, dtype, qweight.device)
    found = pairs.index_select(0, qweight.int().flatten())
    return found.view(qweight.shape).view(dtype if dtype.itemsize == 2 else torch.float32)


@lru_cache(maxsize=16)
@plain_tensors()
def _levels_of_bytes(qtype: QType, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Both levels of each of the 256 bytes, as one integer: one look-up then finds two."""
    exact = dtype if dtype.itemsize == 2 else torch.float32
    levels = torch.tensor(qtype.values, dtype=exact, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack([levels[byte & 15], levels[byte >> 4]], -1)
    return pairs.view(torch.int64 if pairs.dtype.itemsize == 4 else torch.int32)[:, 0]
