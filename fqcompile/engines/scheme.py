"""Scheme: how a layer's weight is stored in the format `pack-quantized`."""

from dataclasses import dataclass

# Code widths and group sizes that every engine has a kernel for; None: one scale per channel.
BITS = (4, 8)
GROUP_SIZES = (128, 64, 32)
WORD_BITS = 32


@dataclass(frozen=True)
class Scheme:
    """`group_size` is None for one scale per output channel."""

    bits: int
    group_size: int | None
    symmetric: bool = True

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {group}{'' if self.symmetric else ' asymmetric'}"

    @property
    def codes_per_word(self) -> int:
        return WORD_BITS // self.bits

    def groups(self, k: int) -> int:
        """Scales in a row of K weights."""
        return 1 if self.group_size is None else -(-k // self.group_size)
