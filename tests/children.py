"""What a forked child finds out, as this user or as another, within bounded time."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
FORK = multiprocessing.get_context("fork")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")


def in_child(task: Callable[[], Any], user: int | None = None, seconds: float = 120.0) -> Any:
    """The result of `task`; the test fails with the traceback of what it raised, or if it hangs.

    What `task` imports must be imported before: another user may not be able to read it.
    """
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=_answer, args=(theirs, task, user), daemon=True)
    child.start()
    theirs.close()
    try:
        assert ours.poll(seconds), f"the child does not end in {seconds} s"
        good, answer = ours.recv()
    except EOFError:
        child.join(10)
        pytest.fail(f"the child ended with {child.exitcode}")
    finally:
        child.kill()
        child.join()
    assert good, answer
    return answer


def _answer(connection: Any, task: Callable[[], Any], user: int | None) -> None:
    try:
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        connection.send((True, task()))
    except BaseException:  # pytest's own failures are no Exceptions
        connection.send((False, traceback.format_exc()))


@contextmanager
def open_folder() -> Iterator[Path]:
    """One that every user may enter, as pytest's own may not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
