"""The layers that are timed: N x K of the linear layers of well-known models, by name."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from fqcompile.errors import OptionError

# Of each model: q, k and v stacked; the output projection; up, or gate over up; down.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama-3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "opt-30b": ((21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672)),
    "opt-66b": ((27648, 9216), (9216, 9216), (36864, 9216), (9216, 36864)),
    "opt-175b": ((36864, 12288), (12288, 12288), (49152, 12288), (12288, 49152)),
    "opt-6.7b": ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)),
    "encoders": ((384, 384), (1536, 384), (384, 1536), (1536, 1536)),
    "squares": ((4096, 4096), (8192, 8192), (16384, 16384)),
}
_SHAPE = re.compile(r"(\d+)x(\d+)")


class Shape(NamedTuple):
    """A weight of N rows and K columns, and the set that it is of."""

    source: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


def parse_shapes(names: Sequence[str]) -> list[Shape]:
    """The shapes of each name, which is that of a set or "NxK"; each N and K once.

    Raises:
        OptionError: a name is neither, or a side is empty.
    """
    found: dict[tuple[int, int], Shape] = {}
    for name in names:
        for n, k in SHAPES.get(name) or [_sides(name)]:
            found.setdefault((n, k), Shape(name if name in SHAPES else "given", n, k))
    return list(found.values())


def _sides(name: str) -> tuple[int, int]:
    match = _SHAPE.fullmatch(name)
    if match is None:
        sets = ", ".join(SHAPES)
        raise OptionError(f"shape {name!r} is neither N x K, such as 4096x14336, nor one of {sets}")
    n, k = map(int, match.groups())
    if not n or not k:
        raise OptionError(f"shape {name!r} has an empty side; N and K are at least 1")
    return n, k


class ExpertShape(NamedTuple):
    """The experts of a model's layer: gate_up [E, 2 I, H] and down [E, H, I]."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


EXPERTS = {
    "qwen3-30b-a3b": ExpertShape(128, 8, 2048, 768),
    "mixtral-8x7b": ExpertShape(8, 2, 4096, 14336),
}
