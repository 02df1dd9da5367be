"""What a benchmark writes: rows, what they were measured on, what failed or was left out and why.

To be quoted, a result says machine, versions, code and command.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fqcompile.files.trusted import replace_text
from fqcompile.kernels.spec import gpu_of
from fqcompile.kernels.tuning.key import fingerprint, kernel_source_hash
from fqcompile.kernels.tuning.measure import DeviceLost, WrongResult, check_device
from fqcompile.report.compile_report import installed_version

COMMIT_VARIABLE = "BENCH_COMMIT"
RESUME_VARIABLE = "BENCH_RESUME"  # the file of results whose run goes on in this process
ROOT = Path(__file__).parents[2]
_DISTRIBUTIONS = {"llama_cpp": "llama_cpp_python"}
_PLACES = ("device", "json", "html", "folder")  # arguments that are no settings
_AND_ALL = " and all after it"
Row = dict[str, Any]
Step = tuple[str, Callable[[], Iterable[Row]]]  # its name, and what measures it
RESULTS = ROOT / "bench" / "results"


@dataclass
class Results:
    """Rows, what they were measured with, and what was left out.

    With a path the file is replaced by each `add`: whoever is stopped leaves what was measured.
    `under_way` is the step that the process is in, or ended in: a kernel that reads where it may
    not takes the process's GPU with it.
    """

    identity: Mapping[str, str]
    settings: dict[str, Any]
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    under_way: str | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace, device: torch.device) -> "Results":
        """With what the run was asked for; empty, unless BENCH_RESUME names its file."""
        settings = {k: v for k, v in vars(arguments).items() if k not in _PLACES}
        results = cls(identity(device), settings, arguments.json)
        if arguments.json and os.environ.get(RESUME_VARIABLE) == str(arguments.json):
            results._take_up(json.loads(arguments.json.read_text(encoding="utf-8")))
        return results

    def _take_up(self, content: Mapping[str, Any]) -> None:
        self.rows, self.under_way = content["rows"], content["under_way"]
        self.left_out = [text.replace(_AND_ALL, "") for text in content["left_out"]]
        if not any(text.startswith(f"{self.under_way}: ") for text in self.left_out):
            self.left_out.append(f"{self.under_way}: its process ended")

    def add(self, *rows: Row) -> None:
        self.rows += rows
        self.write()

    def leave_out(self, *names: str) -> None:
        self.left_out += names
        self.write()

    def fill(self, steps: Iterable[Step], seconds: float) -> None:
        """Adds the rows of each step, or why it has none, as long as there is time.

        What follows a lost GPU, or the keyboard's interrupt, is left out. What a process before
        this one has done of the same steps is passed over, with the one that it ended in.
        """
        budget, ended_in, self.under_way = Budget(seconds), self.under_way, None
        for name, rows in steps:
            if ended_in is not None:
                ended_in = None if name == ended_in else ended_in
                continue
            if not budget.allows_a_step():
                self.leave_out(name)
                continue
            self.under_way = name
            self.write()
            try:
                self._attempt(name, rows)
            except (DeviceLost, KeyboardInterrupt) as end:
                self.leave_out(f"{name}{_AND_ALL}: {str(end) or 'stopped'}")
                return
            self.under_way = None
            self.write()
        self.write()

    def _attempt(self, name: str, rows: Callable[[], Iterable[Row]]) -> None:
        """Raises DeviceLost also where another error is the first to tell of it."""
        try:
            self.add(*rows())
        except Exception as error:
            self.leave_out(f"{name}: {failure(error)}")

    @property
    def content(self) -> dict[str, Any]:
        """What its file holds."""
        content = {
            "identity": dict(self.identity),
            "settings": dict(self.settings),
            "left_out": self.left_out,
            "rows": self.rows,
        }
        return content | ({"under_way": self.under_way} if self.under_way is not None else {})

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(self.content, indent=1) + "\n")


def stored(name: str, root: Path = RESULTS) -> Iterator[dict[str, Any]]:
    """The results called `name` of each device, by device; a "*" in the name stands for anything.

    What the file holds, its own "name" and "folder", and the "figures" that lie beside it.
    """
    for path in sorted(root.glob(f"*/{name}.json")):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        drawn = sorted(file.name for file in path.parent.glob(f"{path.stem}-*.[ps][nv]g"))
        yield {**content, "name": path.stem, "folder": path.parent.name, "figures": drawn}


def duration(text: str) -> float:
    """How long something may take, as it is given on a command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 <= number < math.inf:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 up")


class Budget:
    """Seconds that a run may take. A step begins only where the longest one so far would fit."""

    def __init__(self, seconds: float) -> None:
        self._start = self._step = time.monotonic()
        self._seconds = seconds
        self._longest = 0.0

    @property
    def left(self) -> float:
        return self._seconds - (time.monotonic() - self._start)

    def allows_a_step(self) -> bool:
        """Call it before each step."""
        self._longest = max(self._longest, time.monotonic() - self._step)
        self._step = time.monotonic()
        return self.left > self._longest


def failure(error: Exception) -> str:
    """One line on what went wrong.

    Raises:
        DeviceLost: it took the connection to the GPU with it.
    """
    if isinstance(error, DeviceLost):
        raise error
    if torch.cuda.is_available():
        check_device(error)
    lines = str(error).strip().splitlines() or [""]
    kind = "wrong result" if isinstance(error, WrongResult) else type(error).__name__
    return f"{kind}: {lines[0]}"[:200]


def identity(device: torch.device) -> dict[str, str]:
    """Where and with what this process measures; "kernels" is a digest of the kernels' source."""
    about = {
        "device": device_name(device),
        "commit": commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        about |= fingerprint(gpu_of(device), kernel_source_hash())
    return about


def missing(package: str) -> str | None:
    """Why what a library does cannot be had, or None."""
    return None if find_spec(package) else f"{package} is not installed"


def with_version(package: str) -> str:
    """ "torchao 0.18.0"; a package may be of a distribution with another name. A checkout that is
    found by PYTHONPATH has none: "fqcompile not installed"."""
    return f"{package} {installed_version(_DISTRIBUTIONS.get(package, package))}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return gpu_of(device).name
    known = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", known.read_text()) if known.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as that of a folder: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of the checkout, with "+" where files differ from it.

    A copy without its history has none: there BENCH_COMMIT says it, set by who made the copy.
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
