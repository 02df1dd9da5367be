"""Which rank of torch.distributed this process is; one process alone is rank 0 of 1."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

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


def progress(
    things: Iterable[T] | None = None, desc: str | None = None, **options: Any
) -> "tqdm[T]":
    """A bar of tqdm on rank 0 where standard error is a terminal, and none elsewhere."""
    return tqdm(things, desc, disable=True if rank() else None, **options)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
