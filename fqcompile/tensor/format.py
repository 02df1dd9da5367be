"""Number formats, groups along K, and the format of a packed weight.

A number format is a value: to add one, add a line here. The value of a code is its level times the
scale of its group. A group is `group_size` neighboring weights of one row that share a scale:

    K = 100, group_size = 32:   [ 32 | 32 | 32 | 4 ]     the last group may be short
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

UNIFORM, NORMAL = "uniform", "normal"  # the option `levels`


@dataclass(frozen=True, kw_only=True)
class QType:
    """Signed integers of `bits` bits, stored in `storage_dtype`, and the level of each.

    `sixteenths` are the levels times 16 from the smallest code on, ascending; None: each code is
    its own level. They are integers from -127 to 127, so levels are exact in bfloat16 and float16,
    and in int8 when multiplied by 16. Code 0 is level 0: zeros stay zeros, and what fills up rows
    adds nothing.

    `least_step` is where the scale search starts: the smallest step worth trying, as a fraction of
    the step that reaches the group's extreme. Clipping pays more the fewer codes there are.
    """

    bits: int
    levels: str
    storage_dtype: torch.dtype
    least_step: float
    sixteenths: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """`int4`, `int8`, `normal4`."""
        return f"{'int' if self.levels == UNIFORM else self.levels}{self.bits}"

    @property
    def qmin(self) -> int:
        """The smallest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The level of each code from qmin to qmax."""
        if self.sixteenths is None:
            return tuple(map(float, range(self.qmin, self.qmax + 1)))
        return tuple(n / 16 for n in self.sixteenths)

    @property
    def codes_per_byte(self) -> int:
        """How many codes share one byte of storage."""
        return 8 // self.bits


INT4 = QType(bits=4, levels=UNIFORM, storage_dtype=torch.uint8, least_step=0.2)
INT8 = QType(bits=8, levels=UNIFORM, storage_dtype=torch.int8, least_step=0.8)
# The sum of a level and its mirror image, the 1st and 16th, 2nd and 15th, ..., is always -10: a GPU
# looks up 8 magnitudes, and -5 is the addend of an fma that is there anyway.
NORMAL4 = QType(
    bits=4,
    levels=NORMAL,
    storage_dtype=torch.uint8,
    least_step=0.2,
    sixteenths=(-127, -97, -76, -60, -46, -33, -21, -10, 0, 11, 23, 36, 50, 66, 87, 117),
)

QTYPES: dict[tuple[int, str], QType] = {(q.bits, q.levels): q for q in (INT4, NORMAL4, INT8)}


def qtype_for(bits: int, levels: str) -> QType:
    """The format that these options ask for: 8 bits are uniform whatever `levels` says."""
    return QTYPES[bits, UNIFORM if bits == INT8.bits else levels]


def num_groups(k: int, group_size: int) -> int:
    """Groups in a row of K weights: ceil(K / group_size)."""
    return -(-k // group_size)


def packed_columns(qtype: QType, k: int) -> int:
    """Bytes in a packed row of K codes."""
    return -(-k // qtype.codes_per_byte)


PLAIN = "plain"  # the layout of `codes`, a row of bytes for each row: what files hold


@dataclass(frozen=True)
class Format:
    """How the codes and scales of a weight are read; kernels read equal formats alike.

    Attributes:
        group_size: K for per-channel scales.
        rows, k: shape of the matrix, or of each of `experts` matrices (0: not a stack).
        transposed: the weight is the transpose of the matrices, [K, N] or [E, K, N].
        scale_method: how scales were chosen; also used for new values that are copied in.
        layout: the name of the memory layout.
        levels: the levels of the codes, see `QType`.
    """

    bits: int
    group_size: int
    rows: int
    k: int
    experts: int = 0
    transposed: bool = False
    scale_method: str = "mse"
    layout: str = PLAIN
    levels: str = UNIFORM

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Looked up in every call, and pickled: the hash of a name is another in each process."""
        return hash((self.bits, self.group_size, *self.shape))

    @property
    def qtype(self) -> QType:
        return QTYPES[self.bits, self.levels]

    @property
    def num_groups(self) -> int:
        """Number of scales per row."""
        return num_groups(self.k, self.group_size)

    @property
    def matrices(self) -> tuple[int, ...]:
        """(N, K), or (E, N, K)."""
        return (self.experts, self.rows, self.k) if self.experts else (self.rows, self.k)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        *experts, rows, k = self.matrices
        return (*experts, k, rows) if self.transposed else self.matrices

    @cached_property
    def flipped(self) -> "Format":
        """The format of the transpose, in the same memory."""
        return replace(self, transposed=not self.transposed)

    @cached_property
    def one(self) -> "Format":
        """The format of one expert."""
        return replace(self, experts=0)
