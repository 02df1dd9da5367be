"""Atomic writes: a reader sees a complete file or none; some also survive a power failure.

`replace_file` is for files that can be regenerated, such as caches and reports. All others are
synced to disk before anything refers to them: `write_file`, `replace_durably`, `sync_directory`.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

Piece = bytes | memoryview


def replace_file(
    path: Path, pieces: Iterable[Piece], part: str = ".part", mode: int = 0o644
) -> None:
    """Write the pieces to one file atomically.

    Args:
        part: name of the temporary file in the same directory. Writers that hold a lock use one
            fixed name, so that killed writers leave at most one such file.
        mode: upper bound of the permissions, whatever the umask allows: cache files that others
            could write to are refused.
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
    # Characters that UTF-8 cannot encode, such as a lone surrogate in a name, are escaped.
    content = text.encode("utf-8", errors="backslashreplace")
    own = f".{target.name}.{os.getpid()}-{threading.get_ident()}"
    replace_file(target, [content], own, 0o666)
    return target


def write_file(path: Path, pieces: Iterable[Piece]) -> None:
    """Write the pieces to a file, replacing its content, and sync it to disk."""
    _write(path, pieces, "wb")


def append_to_file(path: Path, piece: Piece) -> None:
    """Append to a file, created if missing, and sync it to disk."""
    _write(path, [piece], "ab")


def _write(path: Path, pieces: Iterable[Piece], mode: str) -> None:
    with open(path, mode) as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, pieces: Iterable[Piece], part: Path) -> None:
    """Write the pieces to `path` atomically, via `part` in the same directory, synced to disk."""
    write_file(part, pieces)
    rename(part, path)
    sync_directory(path.parent)


def rename(source: Path, target: Path) -> None:
    """Replace `target` by `source` atomically: a reader sees the old or the new file."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Delete the file if it exists."""
    if path.exists():
        os.unlink(path)


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries (names of files) to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
