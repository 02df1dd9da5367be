"""What codes and scales are: number formats, groups along K, and the format of a packed weight.

A number format is a value: to add one, add a line here. A group is `group_size` neighbouring
weights of one row that share a scale:

    K = 100, group_size = 32:   [ 32 | 32 | 32 | 4 ]     the last group may be short
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class QType:
    """Signed integers of `bits` bits, stored in `storage_dtype`.

    `least_step` is where the scale search starts: the smallest step worth trying, as a fraction of
    the step that reaches the group's extreme. Clipping pays more the fewer codes there are.
    """

    name: str
    bits: int
    storage_dtype: torch.dtype
    least_step: float

    @property
    def qmin(self) -> int:
        """The smallest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def codes_per_byte(self) -> int:
        """How many codes share one byte of storage."""
        return 8 // self.bits


INT4 = QType(name="int4", bits=4, storage_dtype=torch.uint8, least_step=0.1)
INT8 = QType(name="int8", bits=8, storage_dtype=torch.int8, least_step=0.8)

QTYPES: dict[int, QType] = {qtype.bits: qtype for qtype in (INT4, INT8)}


def num_groups(k: int, group_size: int) -> int:
    """Groups in a row of K weights: ceil(K / group_size)."""
    return -(-k // group_size)


def packed_columns(qtype: QType, k: int) -> int:
    """Bytes in a packed row of K codes."""
    return -(-k // qtype.codes_per_byte)
