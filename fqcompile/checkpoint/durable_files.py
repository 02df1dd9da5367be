"""Files that survive a crash: each is on the disk before anything that speaks of it is written."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from os.path import realpath, samestat
from pathlib import Path

from fqcompile import locks
from fqcompile.errors import CheckpointError

Piece = bytes | memoryview
LOCK = ".fqcompile.lock"


class NotWritten(CheckpointError):
    """The system does not let it be written; what is there stays, to go on from."""


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Whatever the system refuses meanwhile names the directory, and what to do.

    Raises:
        NotWritten: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise NotWritten(
            f"{directory} cannot be written ({error}); give a directory that can be made and that "
            "you can write to, on a disk with room"
        ) from error


def make_directory(directory: Path) -> None:
    """With all that leads to it; where it is a link, what that leads to.

    Raises:
        OSError: there can be none.
    """
    Path(realpath(directory)).mkdir(parents=True, exist_ok=True)


def write_file(path: Path, pieces: Iterable[Piece]) -> None:
    """The pieces one after the other, in a new file or in place of an old one."""
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def append_to_file(path: Path, piece: Piece) -> None:
    """At the end of the file, which is made where it is not there."""
    with open(path, "ab") as file:
        file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """`source` takes the place of `target`: a reader finds the one or the other."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Where it is there."""
    if path.exists():
        os.unlink(path)


def sync_directory(directory: Path) -> None:
    """Which files there are, and by what names, reaches the disk too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One writer at a time; the system releases the lock of a process that dies.

    Its file is there meanwhile alone: what is written becomes a directory that others read.

    Raises:
        CheckpointError: another writer holds it, or the system has no such locks.
    """
    if sys.platform == "win32":
        raise CheckpointError("writing a checkpoint needs the file locks of Linux or macOS")
    path = directory / LOCK
    with ExitStack() as held:
        try:
            descriptor = held.enter_context(locks.locked(path, seconds=0.0))
            # Whoever held it before may have removed the file between its opening and its lock.
            if not samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError
        except (TimeoutError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{directory} is being written by another process; wait for it, or choose another "
                "directory"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
