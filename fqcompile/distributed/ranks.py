"""Which rank of torch.distributed this process is; one process alone is rank 0 of 1."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

from fqcompile.errors import FineQuantError, RankError

T = TypeVar("T")


def rank() -> int:
    """This process's among all."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _together() else 1


def own_folder(directory: Path) -> Path:
    """Where this rank may write without meeting the others: a folder each, if there are others."""
    return directory / f"rank_{rank()}" if world_size() > 1 else directory


class Team:
    """The ranks that do something together: all go on, or none.

    Attributes:
        index, size: this rank's place among them, and how many there are.
    """

    def __init__(self, ranks: Sequence[int] = (), group: Any = None) -> None:
        self.index = ranks.index(rank()) if ranks else 0
        self.size = max(1, len(ranks))
        self._group = group

    def together(self, step: Callable[[], T]) -> list[T]:
        """The results of all.

        Raises:
            RankError: the step failed on another rank, or one of them has ended. Where it failed
                here, the error itself.
        """
        if self.size == 1:
            return [step()]
        error: Exception | None = None
        answers: list[Any] = [None] * self.size
        try:
            own: tuple[str | None, T | None] = (None, step())
        except (FineQuantError, OSError) as caught:
            error, own = caught, (f"{type(caught).__name__}: {caught}", None)
        try:
            dist.all_gather_object(answers, own, group=self._group)
        except RuntimeError as lost:
            raise RankError(f"a rank that takes part has ended: {lost}") from (error or lost)
        if error is not None:
            raise error
        for other, (text, _) in enumerate(answers):
            if text is not None:
                raise RankError(f"it failed on rank {other} of {self.size}: {text}")
        return [result for _, result in answers]


def progress(things: Iterable[T] = (), desc: str | None = None, **options: Any) -> "tqdm[T]":
    """A bar of tqdm on rank 0 where standard error is a terminal, and none elsewhere."""
    return tqdm(things, desc, disable=True if rank() else None, **options)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
