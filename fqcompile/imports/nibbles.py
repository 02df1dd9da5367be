"""What GPTQ and AWQ have alike: matrices [K, N] of 4-bit codes in int32 words, with zero points."""

import torch
from torch import Tensor

CODES_PER_WORD = 8
BITS = 4
MIDDLE = 8  # the zero point of symmetric codes


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] -> uint8 [..., W, 8], the lowest bits first."""
    shifts = torch.arange(0, CODES_PER_WORD * BITS, BITS, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 0xF).to(torch.uint8)
