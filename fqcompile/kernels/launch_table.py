"""LaunchTable: which configuration a kernel runs with, by the number of rows of x."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from fqcompile.errors import OptionError
from fqcompile.kernels.tile_config import TileConfig


class Way(Enum):
    """What is no tile configuration: dequantise into scratch, then let cuBLAS multiply."""

    DENSE = "dense"

    def __str__(self) -> str:
        return self.value


DENSE: Final = Way.DENSE
Config = TileConfig | Literal[Way.DENSE]
Step = tuple[int | None, Config]
_STEP = re.compile(r"(?:m(\d+)=)?(.+)")


def parse_config(text: str) -> Config:
    """The configuration that `str()` wrote: "16x128x128x8w4s4" or "dense"."""
    return DENSE if text == DENSE.value else TileConfig.parse(text)


@dataclass(frozen=True)
class LaunchTable:
    """Steps (largest M or None, configuration): bounds ascend, and only the last one is open.

    Raises:
        OptionError: the bounds do not.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.steps]
        limits = [bound for bound in bounds[:-1] if bound is not None]
        if not bounds or bounds[-1] is not None or len(limits) != len(bounds) - 1:
            raise OptionError(f"launch table {self!s}: the last step alone has no bound of M")
        if sorted(set(limits)) != limits:
            raise OptionError(f"launch table {self!s}: bounds of M must ascend")

    def at(self, m: int) -> Config:
        """The configuration for `m` rows."""
        for bound, config in self.steps:
            if bound is None or m <= bound:
                return config
        raise AssertionError("the last step has no bound")

    def __str__(self) -> str:
        return ",".join(f"{config}" if m is None else f"m{m}={config}" for m, config in self.steps)

    @classmethod
    def of(cls, config: Config) -> "LaunchTable":
        """One configuration for any number of rows."""
        return cls(((None, config),))

    @classmethod
    def parse(cls, text: str) -> "LaunchTable":
        """The table that `str()` wrote, e.g. "m16=16x128x128x8w4s4,m128=64x128x128x1w4s3,dense"."""
        steps: list[Step] = []
        for part in text.split(","):
            match = _STEP.fullmatch(part)
            if match is None:
                raise OptionError(f"launch table {text!r} has an empty step")
            bound, config = match.groups()
            steps.append((None if bound is None else int(bound), parse_config(config)))
        return cls(tuple(steps))
