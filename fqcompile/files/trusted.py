"""Files of our own: written as a whole or not at all, and trusted if nobody else could write.

`replace_file` is for files that can be regenerated, such as caches and reports: a reader sees a
complete file or none. All others are synced to disk before anything refers to them, so that they
survive a power failure: `write_file`, `replace_durably`, `sync_directory`.

The cache directory persists between processes. Its files are loaded as code or used as weights, so
a file is trusted only if nobody except this user and root could have written it.
"""

import logging
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from fqcompile.locks import locked

if sys.platform != "win32":
    import grp
    import pwd

log = logging.getLogger("fqcompile")

_warned: set[Path] = set()
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


def cache_directory() -> Path:
    """$FQCOMPILE_CACHE_DIR, else "fqcompile" in $XDG_CACHE_HOME or ~/.cache."""
    own, shared = os.environ.get("FQCOMPILE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    home = os.path.expanduser("~")
    if not shared and home == "~":  # a user whom the system does not know
        return fallback_directory()
    return Path(shared or os.path.join(home, ".cache")) / "fqcompile"


def fallback_directory() -> Path:
    """This user's fallback directory below the folder for temporary files, for required files."""
    user = "" if sys.platform == "win32" else f"-{os.geteuid()}"
    try:
        return Path(tempfile.gettempdir()) / f"fqcompile{user}"
    except FileNotFoundError:  # all are full
        return Path("/tmp") / f"fqcompile{user}"


@contextmanager
def writing(directory: Path, lock: str = ".lock", seconds: float = 60.0) -> Iterator[None]:
    """Lock a directory of the cache for one process at a time; create the directory if missing.

    Raises:
        OSError: it cannot be written, others may write there, or the lock is held too long.
    """
    directory = directory.absolute()
    for path in [p for p in (*reversed(directory.parents), directory) if not p.exists()]:
        if sys.platform != "win32":
            _check(str(path.parent), is_passed=True)
        # What lies below the folder for temporary files has no parent that keeps others out.
        path.mkdir(0o700 if path == fallback_directory() else 0o755, exist_ok=True)
    check_trusted(directory)
    with locked(directory / lock, seconds):
        yield


def check_trusted(path: Path) -> None:
    """Check that only this user and root can change a file or directory, or any parent of it.

    Raises:
        PermissionError: others can; the message says where, and what to do.
        OSError: it does not exist, cannot be reached, or is of another kind, such as a pipe, on
            which a read would block.
    """
    if sys.platform != "win32":
        mode = os.stat(path).st_mode  # whatever is wrong with the way, such as a loop of links
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(f"{path} is neither a file nor a directory")
        _check(str(path.absolute()))


def _check(path: str, is_passed: bool = False) -> None:
    """Check each place from the root to `path`, and targets of links; `is_passed`: as parents."""
    steps = path.rstrip("/").split("/")
    for end in range(1, len(steps) + 1):
        place = "/".join(steps[:end]) or "/"
        passed = is_passed or end < len(steps)
        about = os.lstat(place)
        _check_place(place, about, passed)
        if stat.S_ISLNK(about.st_mode):
            _check(os.path.join(os.path.dirname(place), os.readlink(place)), passed)


def _check_place(place: str, about: os.stat_result, passed: bool) -> None:
    is_ours = about.st_uid in (0, os.geteuid())
    # A namespace may show root as nobody; who owns "/" can change anything anyway.
    if not is_ours and not (passed and about.st_uid == os.lstat("/").st_uid):
        raise PermissionError(
            f"{place} belongs to user {about.st_uid}, who could change what is loaded from it"
        )
    # Of a folder such as /tmp each may change what is his own, and nothing else.
    is_shared = passed and about.st_mode & stat.S_ISVTX
    if not is_shared and not stat.S_ISLNK(about.st_mode) and _others_may_write(about):
        raise PermissionError(
            f"others may write to {place} (mode {stat.S_IMODE(about.st_mode):o}), and so change "
            f"what is loaded from it: chmod go-w {place}"
        )


def _others_may_write(about: os.stat_result) -> bool:
    if about.st_mode & stat.S_IWOTH:
        return True
    return bool(about.st_mode & stat.S_IWGRP) and not _is_own_group(os.geteuid(), about.st_gid)


@cache
def _is_own_group(user: int, group: int) -> bool:
    """Whether the group is the user's private one: many systems let it write by default."""
    try:
        his, members = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    own = his.pw_gid == group and his.pw_name == members.gr_name
    return own and set(members.gr_mem) <= {his.pw_name}


def warn_unusable(directory: Path, error: BaseException) -> None:
    """Warn, once per process and cache, that nothing can be stored there, and why."""
    level = logging.INFO if directory.parent in _warned else logging.WARNING
    _warned.add(directory.parent)
    log.log(
        level,
        "kernels and quantized weights cannot be kept in %s (%s)%s: the next start makes them "
        "again; set FQCOMPILE_CACHE_DIR to a directory that you alone can write to, with room",
        directory,
        error,
        _fallback_trouble(directory),
    )


def _fallback_trouble(directory: Path) -> str:
    """Why the directory that stands in cannot be used either, where somebody was there before."""
    fallback = fallback_directory()
    if fallback == directory.parent:
        return ""
    try:
        check_trusted(fallback)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f", nor in {fallback} ({error})"
    return ""
