"""A disk whose power fails: at a chosen operation, and then what was not synced may be lost.

It stands in for the operating system below `trusted`. After the failure every
operation fails, so nothing can be cleaned up, as after SIGKILL. Then

    a file that was not synced keeps some of its bytes
    renames, removals and new files that no sync of the directory followed are undone: the latest of
    them, or any
"""

import builtins
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fqcompile.files import trusted


class PowerFailure(BaseException):
    """Not an Exception: nothing may handle it."""


class Disk:
    """Counts operations, and fails at number `fails_at` (None: never)."""

    def __init__(self, fails_at: int | None = None, seed: int = 0) -> None:
        self.operations = 0
        self._fails_at, self._rng, self._failed = fails_at, random.Random(seed), False
        self._unsynced: dict[Path, int] = {}  # and how many of its bytes are safe
        self._undo: list[Callable[[], object]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(trusted, "open", self.open, raising=False)
        replaced = {"fsync": self.fsync, "replace": self.replace, "unlink": self.unlink}
        kept = {name: getattr(os, name) for name in ("open", "close", "O_RDONLY")}
        patch.setattr(trusted, "os", SimpleNamespace(**kept, **replaced))

    def operation(self) -> None:
        if self._failed or self.operations == self._fails_at:
            self._failed = True
            raise PowerFailure
        self.operations += 1

    def open(self, name: Path, mode: str) -> Any:
        self.operation()
        path = Path(name)
        if not path.exists():
            self._undo.append(lambda: path.unlink(missing_ok=True))
        safe = path.stat().st_size if mode == "ab" and path.exists() else 0
        self._unsynced[path] = min(safe, self._unsynced.get(path, safe))
        return _File(self, builtins.open(path, mode), path)

    def fsync(self, descriptor: int) -> None:
        self.operation()
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self._undo.clear()
        else:
            self._unsynced.pop(path, None)

    def replace(self, source: Path, target: Path) -> None:
        self.operation()
        before = target.read_bytes() if target.exists() else None
        content = source.read_bytes()
        os.replace(source, target)
        self._unsynced.pop(target, None)
        if source in self._unsynced:
            self._unsynced[target] = self._unsynced.pop(source)

        def undo() -> None:
            source.write_bytes(content)
            if before is None:
                target.unlink()
            else:
                target.write_bytes(before)

        self._undo.append(undo)

    def unlink(self, path: Path) -> None:
        self.operation()
        content = path.read_bytes()
        os.unlink(path)
        self._undo.append(lambda: path.write_bytes(content))

    def lose(self) -> None:
        """What the power failure costs."""
        kept = self._rng.randint(0, len(self._undo))
        in_order = self._rng.random() < 0.5
        for number, undo in reversed(list(enumerate(self._undo))):
            if number >= kept if in_order else self._rng.random() < 0.5:
                undo()
        for path, safe in self._unsynced.items():
            if path.exists():
                data = path.read_bytes()
                path.write_bytes(data[: self._rng.randint(min(safe, len(data)), len(data))])

    def partly(self, data: Any) -> bytes:
        """What reaches the file of a write in which the power fails."""
        whole = bytes(data)
        return whole[: self._rng.randint(0, len(whole))]

    @property
    def fails_now(self) -> bool:
        return self.operations == self._fails_at


class _File:
    """A file that is being written."""

    def __init__(self, disk: Disk, file: Any, path: Path) -> None:
        self._disk, self._file, self._path = disk, file, path

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> None:
        if self._disk.fails_now:
            self._file.write(self._disk.partly(data))
        self._disk.operation()
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())


def crash(action: Callable[[], object], fails_at: int, seed: int) -> bool:
    """Run `action` on a disk that fails; False where it was over before that."""
    disk = Disk(fails_at, seed)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        try:
            action()
        except PowerFailure:
            disk.lose()
            return True
    return False


def count_operations(action: Callable[[], object]) -> int:
    """How many there are to fail at."""
    disk = Disk()
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        action()
    return disk.operations
