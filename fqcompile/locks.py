"""Locks between threads and between processes that stay correct after os.fork.

Only the forking thread exists in the child. A lock that another thread held would never be
released there, and a file lock of the parent would stay held for as long as the child lives.
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
_PATIENCE = 30.0  # seconds of waiting before a warning names the file

_state = {"forked": False}
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_waited_for: set[Path] = set()
_held: dict[object, int] = {}  # one token for each file lock held -> its file descriptor
_guard = threading.RLock()  # no fork between opening a descriptor and recording it


# True in a child of os.fork, where libgomp would wait forever for the parent's threads. Implemented
# in C (dict.__getitem__) because every call of the x86 kernel asks.
in_forked_child: Callable[[], bool] = partial(_state.__getitem__, "forked")


def fork_safe(lock: Lock) -> Lock:
    """Register a threading.RLock to be free in a forked child, unless the forking thread holds it.

    Use it only for locks around state that is consistent after every statement: the thread that
    held the lock stops in the child wherever it was.
    """
    _locks.add(lock)
    return lock


@contextmanager
def locked(path: Path, seconds: float = 60.0) -> Iterator[int]:
    """Hold an exclusive lock on the file `path`; it ends with its holder, even one that is killed.

    The file is created if it does not exist, and no other user may open it: anyone who can open a
    file, even only to read it, can lock it. Yields the descriptor, from which a caller can tell
    whether the locked file is still the one at `path`.

    Raises:
        TimeoutError: another process held the lock for `seconds`.
        OSError: the file cannot be created or locked here.
    """
    token = object()
    with _guard:
        descriptor = _held[token] = _opened(path)
    try:
        _lock(descriptor, path, seconds)
        yield descriptor
    finally:
        with _guard:
            if token in _held:  # false in a child that was forked inside the context
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
        # Closing alone would not unlock it while a forked child still has the descriptor open.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _after_fork_in_child() -> None:
    _state["forked"] = True
    # The standard library makes its own locks fork-safe by the same two methods.
    _guard._at_fork_reinit()  # type: ignore[attr-defined]
    for lock in [lock for lock in _locks if not lock._is_owned()]:
        lock._at_fork_reinit()
    for descriptor in _held.values():
        os.close(descriptor)  # unlocking would also release the parent's lock
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_guard.acquire,
        after_in_parent=_guard.release,
        after_in_child=_after_fork_in_child,
    )
