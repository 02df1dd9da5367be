"""Measures in a process of its own, where nothing is imported, compiled or cached yet."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.core.results import Row

_ERROR = re.compile(r"[A-Za-z_][\w.]*: ")


class ChildFailed(RuntimeError):
    """The process ended without a result; the text is the last line that names an error."""


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
