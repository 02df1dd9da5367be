"""Files that a reader finds whole or not at all; of some also whoever comes after a power failure.

`replace_file` is for what can be made again: caches, reports. What cannot is on the disk before
anything that speaks of it is written: `write_file`, `replace_durably`, `sync_directory`.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

Piece = bytes | memoryview


def replace_file(
    path: Path, pieces: Iterable[Piece], part: str = ".part", mode: int = 0o644
) -> None:
    """The pieces in one file, whole or not at all.

    Args:
        part: name of the file beside it that they are written to first. One name serves all that
            write while they hold a lock, so that a kill leaves one such file.
        mode: whatever the umask says, no more is allowed: a file of a cache that others could
            write to is refused.
    """
    # A rename is atomic only within one file system, hence a neighbor and not the system's tmp.
    beside = path.with_name(part)
    try:
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            file.writelines(pieces)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replace_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path`, making its folders, and return the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # What has no place in UTF-8, as half a surrogate pair in a name, is spelt out.
    content = text.encode("utf-8", errors="backslashreplace")
    own = f".{target.name}.{os.getpid()}-{threading.get_ident()}"
    replace_file(target, [content], own, 0o666)
    return target


def write_file(path: Path, pieces: Iterable[Piece]) -> None:
    """The pieces one after the other, in a new file or in place of an old one, and on the disk."""
    _write(path, pieces, "wb")


def append_to_file(path: Path, piece: Piece) -> None:
    """At the end of the file, which is made if it is not there, and on the disk."""
    _write(path, [piece], "ab")


def _write(path: Path, pieces: Iterable[Piece], mode: str) -> None:
    with open(path, mode) as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, pieces: Iterable[Piece], part: Path) -> None:
    """The pieces at `path`, and on the disk, by way of `part` in the same directory."""
    write_file(part, pieces)
    rename(part, path)
    sync_directory(path.parent)


def rename(source: Path, target: Path) -> None:
    """`source` takes the place of `target`: a reader finds the one or the other."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Delete the file if it exists."""
    if path.exists():
        os.unlink(path)


def sync_directory(directory: Path) -> None:
    """Which files there are, and by what names, reaches the disk too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
