"""TileConfig: tile sizes and launch parameters of a Triton kernel, as a small validated value."""

import re
from dataclasses import dataclass

from fqcompile.errors import OptionError

_PATTERN = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)w(\d+)s(\d+)")


@dataclass(frozen=True)
class TileConfig:
    """`BLOCK_M x BLOCK_N` output tile, `BLOCK_K` step, split-K factor, warps, pipeline stages.

    Raises:
        OptionError: a size is not a power of two, or `num_stages` is below 1.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise OptionError(f"TileConfig.{name}={value} must be a power of two")
        if self.num_stages < 1:
            raise OptionError(f"TileConfig.num_stages={self.num_stages} must be at least 1")

    def __str__(self) -> str:
        tile = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}x{self.SPLIT_K}"
        return f"{tile}w{self.num_warps}s{self.num_stages}"

    @classmethod
    def parse(cls, text: str) -> "TileConfig":
        """The config that `str()` wrote as `text`, for example "16x64x128x1w4s3"."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise OptionError(
                f"tile config {text!r} is not of the form "
                "BLOCK_MxBLOCK_NxBLOCK_KxSPLIT_KwWARPSsSTAGES, for example '16x64x128x1w4s3'"
            )
        return cls(*map(int, match.groups()))
