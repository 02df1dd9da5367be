"""Measures in a process of its own, where nothing is imported, compiled or cached yet."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.results import Row


class ChildFailed(RuntimeError):
    """The process ended without a result; the text is its last line."""


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
        raise ChildFailed(lines[-1])
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row
