"""Locks between threads and between processes, and what becomes of them in a forked child.

The threads of the parent are not in the child: what they held nobody would release there, and the
child would keep the parent's lock on a file for as long as it lives.
"""

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("fqcompile")

Lock = TypeVar("Lock")
_PATIENCE = 30.0  # seconds until it is said what is waited for

_state = {"forked": False}
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_waited_for: set[Path] = set()
_held: dict[object, int] = {}  # what holds a lock on a file: its descriptor
_guard = threading.RLock()  # no fork between opening a descriptor and noting it


# True in a child of os.fork: libgomp would wait there for the parent's threads forever. In C, as
# every call of the x86 kernel asks.
in_forked_child: Callable[[], bool] = partial(_state.__getitem__, "forked")


def fork_safe(lock: Lock) -> Lock:
    """A threading.RLock that is free in a forked child, unless the thread that forks holds it.

    For locks around state that is whole between any two statements: another thread is cut off.
    """
    _locks.add(lock)
    return lock


@contextmanager
def locked(path: Path, seconds: float = 60.0) -> Iterator[int]:
    """One holder of `path` at a time; the lock ends with its holder, however that ends.

    The file is made where it is not there, and nobody else may open it: who can open a file, if
    only to read, can hold its lock. Its descriptor tells whether it is at `path` still.

    Raises:
        TimeoutError: another holds it for so long.
        OSError: there can be no such file here, or no lock.
    """
    token = object()
    with _guard:
        descriptor = _held[token] = _opened(path)
    try:
        _lock(descriptor, path, seconds)
        yield descriptor
    finally:
        with _guard:
            if token in _held:  # not in a child that was forked inside
                _release(_held.pop(token))


def _opened(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    if sys.platform != "win32" and os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)  # earlier versions let others read it
    return descriptor


def _lock(descriptor: int, path: Path, seconds: float) -> None:
    if sys.platform == "win32":
        return None
    start, pause = time.monotonic(), 0.001
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - start
        if waited >= seconds:
            raise TimeoutError(f"another process holds {path} for more than {seconds:g} s")
        if waited > _PATIENCE and path not in _waited_for:
            _waited_for.add(path)
            log.warning(
                "waiting for another process, which holds %s, for up to %g s", path, seconds
            )
        time.sleep(min(pause, seconds - waited))
        pause = min(2 * pause, 0.05)


def _release(descriptor: int) -> None:
    if sys.platform != "win32":
        # Closing would not do where a child has not come to close its own yet.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _after_fork_in_child() -> None:
    _state["forked"] = True
    # The standard library makes its own locks fork-safe by the same two methods.
    _guard._at_fork_reinit()  # type: ignore[attr-defined]
    for lock in [lock for lock in _locks if not lock._is_owned()]:
        lock._at_fork_reinit()
    for descriptor in _held.values():
        os.close(descriptor)  # unlocking would take it from the parent
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_guard.acquire,
        after_in_parent=_guard.release,
        after_in_child=_after_fork_in_child,
    )
