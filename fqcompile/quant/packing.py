"""The plain layout of codes [N, K] in storage, and back, exactly.

int8: byte k of a row is code k
int4: byte j of a row is (code[2j] + 8) | (code[2j+1] + 8) << 4; an odd K is padded with code 0
"""

import torch
from torch.nn.functional import pad

from fqcompile.quant.qtype import QType


def packed_columns(qtype: QType, k: int) -> int:
    """Bytes in a packed row of K codes."""
    return -(-k // qtype.codes_per_byte)


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
