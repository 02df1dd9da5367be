"""The cache directory that persists between processes: its path, permission checks and locking.

Its files are loaded as code or used as weights, so a file is trusted only if nobody except this
user and root could have written it.
"""

import logging
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from fqcompile.locks import locked

if sys.platform != "win32":
    import grp
    import pwd

log = logging.getLogger("fqcompile")

_warned: set[Path] = set()


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
