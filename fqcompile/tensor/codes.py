"""Codes: pack [N, K] codes into the plain layout, unpack them exactly, and dequantize them.

int8: byte k of a row is code k
int4: byte j of a row is (code[2j] + 8) | (code[2j+1] + 8) << 4; an odd K is padded with code 0
"""

import torch
from torch.nn.functional import pad

from fqcompile.tensor.chunks import group_parts, row_chunks
from fqcompile.tensor.format import QTYPES, QType

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


def dequantize_affine(
    codes: torch.Tensor, scale: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """q * scale [N, K], rounded once to `dtype`."""
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in row_chunks(codes, _DEQUANTIZE_SHARE):
        _write_values(values[rows], codes[rows], scale[rows], group_size)
    return values


def dequantize_rows(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same from packed codes: [rows of qweight, K]."""
    values = torch.empty(qweight.shape[0], k, dtype=dtype, device=qweight.device)
    for rows in row_chunks(values, _DEQUANTIZE_SHARE):
        codes = unpack(qweight[rows], QTYPES[bits], k)
        _write_values(values[rows], codes, scale[rows], group_size)
    return values


def _write_values(
    out: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, group_size: int
) -> None:
    """out = codes * scale; a product of two types is formed in the wider one and rounded once."""
    out.copy_(codes)
    for part, s in group_parts(out, scale, group_size):
        part.mul_(s)
