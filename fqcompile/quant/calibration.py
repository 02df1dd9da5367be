"""Calibration: how much an error counts in each column of a weight, from the inputs of its matmuls.

    h[k] = mean over rows of x[:, k]² / its mean over k, and then half and half with 1

Half of it is 1, so that few rows, or rows that are alike, cannot make a column count for nothing.
h is the same for x of any scale. It is rounded to eight bits: what a library may do otherwise from
one process to the next, in the last bit of an activation, is hardly ever seen in it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fqcompile.distributed.ranks import rank
from fqcompile.distributed.shards import is_part
from fqcompile.tensor.chunks import plain_tensors

_SEED = 0
# Elements that are squared in float64 at a time. On a CPU too few for PyTorch to add with several
# threads, so that their order is fixed; the memory of so many is in the cache, and used again.
_CHUNK, _CHUNK_OF_CPU = 1 << 22, (1 << 15) - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration:
    """How much errors count in each column of a weight, and the inputs that said so.

    Attributes:
        asked: the option; other options give the same weight other codes.
        h: float32 [K], or [E, K] of a stack of experts, on the CPU; None where all count alike.
        source: what the inputs were: "synthetic", "first_call", "batches", or "none" and why.
        rows: the number of rows that were multiplied with the weight, of all experts together.
    """

    asked: str
    h: Tensor | None = None
    source: str = "none"
    rows: int = 0

    @classmethod
    def of(cls, moments: "Moments", asked: str, source: str, row: Sequence["Moments"] = ()) -> Self:
        """As the moments say; for `row` see `Moments.h`."""
        h, rows = moments.h(row), sum(moments.rows)
        if h is None:
            what = "its inputs were zeros or not finite" if rows else "no row came to it"
            return cls(asked=asked, source=f"none: {what}", rows=rows)
        unseen = moments.rows.count(0)
        text = f"{source}, {unseen} of {len(h)} experts without rows" if unseen else source
        return cls(asked=asked, h=h if moments.stacked else h[0], source=text, rows=rows)


class Moments:
    """Sums of the squares of the inputs of one weight, for each column and expert, in float64.

    Attributes:
        total: [E, K] on the CPU, with E = 1 for a matrix.
        rows: for each expert, how many rows were added.
        stacked: whether it is of a stack of experts.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        """For a weight of shape [N, K] or [E, N, K]."""
        *experts, _, k = shape
        self.stacked = bool(experts)
        self.rows = [0] * (experts[0] if experts else 1)
        self.total = torch.zeros(len(self.rows), k, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor, expert: int = 0) -> None:
        """Count the rows x [..., K], which one matrix is multiplied with."""
        rows = x.reshape(-1, x.shape[-1])
        self.rows[expert] += len(rows)
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        chunk = _CHUNK_OF_CPU if rows.is_cpu else _CHUNK
        for piece in rows.split(max(1, chunk // max(1, rows.shape[1]))):
            total += piece.to(torch.float64, copy=True).square_().sum(0)
        self.total[expert] += total.cpu()

    @classmethod
    def sum(cls, each: Sequence["Moments"]) -> "Moments":
        """Of the rows of all, as of several products with one weight, or of several ranks."""
        first, *others = each
        total = copy(first)
        for other in others:
            total.total = total.total + other.total
            total.rows = [a + b for a, b in zip(total.rows, other.rows, strict=True)]
        return total

    def shared(self) -> "Moments":
        """Of all experts together, for each of them: where they are one matrix, read repeatedly."""
        total = copy(self)
        total.total = self.total.sum(0).expand_as(self.total)
        return total

    def h(self, row: Sequence["Moments"] = ()) -> Tensor | None:
        """float32 [E, K]; None where no row was seen, or none that is finite and not zero.

        `row`: those of all ranks, each with other columns of the same rows; else this has them all.
        """
        pieces = list(row) or [self]
        sums = torch.stack([piece.total.sum(1) for piece in pieces]).sum(0)
        size, rows = sum(piece.total.shape[1] for piece in pieces), sums.new_tensor(self.rows)
        if not 0 < float(sums.sum()) < math.inf:
            return None
        # an expert without rows, or with zeros alone, counts errors as its stack does
        seen = (rows > 0) & (sums > 0)
        total = torch.where(seen[:, None], self.total, self.total.sum(0))
        mean = torch.where(seen, sums, sums.sum()) / size
        return ((total / mean[:, None] + 1) / 2).to(torch.bfloat16).float()


def over_ranks(
    each: Sequence[Moments], whole: Any, column: int
) -> tuple[Moments, Sequence[Moments]]:
    """The moments of this rank's weight, and the `row` for its h, from the moments on each rank.

    Of a weight that every rank has whole, the sum of all, so that all ranks get the same h.

    Args:
        whole: the DTensor that the weight is the local part of, if there is one.
        column: its dimension along the columns of the matrix; -1 where it is not known.
    """
    if not is_part(whole):
        return Moments.sum(each), ()
    own = each[whole.device_mesh.mesh.flatten().tolist().index(rank()) if len(each) > 1 else 0]
    return own, each if any(placed.is_shard(column) for placed in whole.placements) else ()


def token_ids(
    shape: Sequence[int], rows: int, generator: torch.Generator, begin: int | None = None
) -> Tensor:
    """Random ids of a table with so many rows; int64 on the CPU, where the generator is.

    `begin`: what each sequence [..., length > 1] begins with, if it is in the table: many models
    send most of their attention, and their largest values, to it. Ids in one dimension may be
    several sequences, one after the other, and stay random.
    """
    ids = torch.randint(0, rows, tuple(shape), generator=generator, device="cpu")
    if begin is not None and 0 <= begin < rows and len(shape) > 1 and shape[-1] > 1:
        ids[..., 0] = begin
    return ids


def token_generator() -> torch.Generator:
    """The random numbers that ids are drawn from, the same in every process."""
    return torch.Generator("cpu").manual_seed(_SEED)


@contextmanager
def fixed_random_numbers(devices: Iterable[torch.device]) -> Iterator[None]:
    """What draws random numbers, such as dropout, draws the same ones; afterwards all is as before.

    Without gradients, and with ordinary tensors even in a caller's inference mode.
    """
    gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    with plain_tensors(), torch.random.fork_rng(gpus, device_type="cuda"):
        # not torch.manual_seed, which also seeds the GPUs that no tensor is on
        for own in (torch.default_generator, *(torch.cuda.default_generators[i] for i in gpus)):
            own.manual_seed(_SEED)
        yield
