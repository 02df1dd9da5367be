"""Processes of their own, where nothing is imported, compiled or cached yet, and their memory."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.core.results import Row

_ERROR = re.compile(r"[A-Za-z_][\w.]*: ")


class ChildFailed(RuntimeError):
    """The process ended without a result; the text is the last line that names an error."""


def caches_in(folder: Path) -> dict[str, str]:
    """The environment of a process that has its caches, Inductor's, Triton's and ours, in there."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "FQCOMPILE_CACHE_DIR": str(folder / "fqcompile"),
    }


def in_fresh_process(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> Row:
    """What `python -m module arguments` prints as JSON in its last line.

    Raises:
        ChildFailed: its status is not 0.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        errors = [line for line in lines if _ERROR.match(line)]
        raise ChildFailed((errors or lines)[-1])
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def resident() -> int:
    """Bytes in memory now, mapped files included."""
    return _status("VmRSS")


def anonymous() -> int:
    """Bytes in memory now that no file backs: what the system cannot drop and read again."""
    return _status("RssAnon")


def peak() -> int:
    """The most that was resident since the last `reset_peak`, or since the process began."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Give back what is garbage, and what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
