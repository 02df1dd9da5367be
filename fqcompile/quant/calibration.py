"""Calibration: how much an error counts in each column of a weight, from the inputs of its matmuls.

    h[k] = mean over rows of x[:, k]² / its mean over k, and then half and half with 1

Half of it is 1, so that few rows, or rows that are alike, cannot make a column count for nothing.
h is the same for x of any scale. It is rounded to eight bits: what a library may do otherwise from
one process to the next, in the last bit of an activation, is hardly ever seen in it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fqcompile.tensor.chunks import plain_tensors

_SEED = 0
_CHUNK = 1 << 22  # elements that are squared in float64 at a time


@dataclass(frozen=True, eq=False)
class Calibration:
    """How much errors count in each column of a weight, and the inputs that said so.

    Attributes:
        h: float32 [K], or [E, K] of a stack of experts, on the CPU; about 1 on average.
        source: what the inputs were, as in reports.
        rows: the number of rows that were multiplied with the weight, of all experts together.
        unseen: experts that had no row; they count errors as their stack does on average.
    """

    h: Tensor
    source: str
    rows: int
    unseen: int = 0

    def __str__(self) -> str:
        unseen = f", {self.unseen} experts without any" if self.unseen else ""
        return f"{self.source}: {self.rows} rows{unseen}"


class Moments:
    """Sums of the squares of the inputs of one weight, for each column and expert, in float64.

    Attributes:
        total: [E, K] on the CPU, with E = 1 for a matrix.
        rows: for each expert, how many rows were added.
    """

    def __init__(self, k: int, experts: int = 1) -> None:
        self.total = torch.zeros(experts, k, dtype=torch.float64)
        self.rows = [0] * experts

    def add(self, x: Tensor, expert: int = 0) -> None:
        """Count the rows x [..., K], which one matrix is multiplied with."""
        rows = x.reshape(-1, x.shape[-1])
        self.rows[expert] += len(rows)
        for piece in rows.split(max(1, _CHUNK // max(1, rows.shape[1]))):
            self.total[expert] += piece.double().square().sum(0).cpu()

    def merge(self, other: "Moments") -> None:
        """Count the rows of another as well, such as another rank's."""
        self.total += other.total
        self.rows = [a + b for a, b in zip(self.rows, other.rows, strict=True)]

    def mean_square(self) -> float:
        """The mean over all rows, columns and experts that were seen."""
        return float(self.total.sum()) / max(1, sum(self.rows) * self.total.shape[1])

    def h(self, mean_square: float | None = None) -> Tensor | None:
        """float32 [E, K]; None where no row was seen, or none that is finite and not zero.

        `mean_square` takes the place of the matrix's own mean where other ranks have more columns.
        """
        whole = self.mean_square()
        if not 0 < whole < math.inf:
            return None
        return torch.stack(list(self._each(mean_square))).to(torch.bfloat16).float()

    def _each(self, mean_square: float | None) -> Iterator[Tensor]:
        for total, rows in zip(self.total, self.rows, strict=True):
            # an expert without rows, or with zeros alone, counts errors as its stack does
            mean = (
                total / rows if rows and bool(total.any()) else self.total.sum(0) / sum(self.rows)
            )
            yield (mean / (mean_square or mean.mean()) + 1) / 2


def token_ids(shape: Sequence[int], rows: int, generator: torch.Generator) -> Tensor:
    """Random ids of a table with so many rows; int64 on the CPU, where the generator is."""
    return torch.randint(0, rows, tuple(shape), generator=generator)


def token_generator() -> torch.Generator:
    """The random numbers that ids are drawn from, the same in every process."""
    return torch.Generator().manual_seed(_SEED)


@contextmanager
def fixed_random_numbers(devices: Iterable[torch.device]) -> Iterator[None]:
    """What draws random numbers, such as dropout, draws the same ones; afterwards all is as before.

    Without gradients, and with ordinary tensors even in a caller's inference mode.
    """
    gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    with plain_tensors(), torch.random.fork_rng(gpus, device_type="cuda"):
        torch.manual_seed(_SEED)
        yield
