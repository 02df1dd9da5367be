"""Benchmarks one after another, each in a process of its own; one that fails stops none."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from bench.core.results import RESUME_VARIABLE, duration

ROOT = Path(__file__).parents[2]
BENCH = (sys.executable, "-u", "-m", "bench")
Ended = tuple[str, str, float, str]  # step, how it ended, its seconds, the last line it printed


@dataclass(frozen=True)
class Step:
    """`command(directory, seconds it may take)`.

    share: of what is left of the budget. expected: seconds that it is thought to take. shown:
    characters of the end of its output, which is whole in the folder.
    """

    command: Callable[[Path, float], Sequence[str]]
    share: float = 1.0
    expected: float = 0.0
    shown: int = 1000


_TO_START = 20.0  # seconds in which a benchmark has begun
EACH_ITS_OWN = "{step}.log"  # the file that a step's output goes to


def run_suite(
    steps: Mapping[str, Step],
    argv: Sequence[str] | None,
    *,
    usual: Sequence[str],
    seconds: float,
    out: Path | None = None,
    log: str = EACH_ITS_OWN,
) -> None:
    """The command line of a suite.

    Args:
        usual: the steps that run unless others are asked for.
        seconds: that it takes at most unless told otherwise.
        out: where results and logs go; without one it must be said.
        log: the file there that a step's output goes to; one for all has no "{step}", and what
            comes later is put behind what is there.

    Raises:
        SystemExit: with status 1, where a step did not pass.
    """

    def names(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in steps]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(steps)}")
        return given

    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--out", type=writable_folder, default=out, required=not out, metavar="DIRECTORY"
    )
    parser.add_argument(
        "--budget", "--time-budget", type=duration, default=seconds, metavar="SECONDS"
    )
    parser.add_argument("--steps", type=names, default=list(usual), metavar="NAME,...")
    arguments = parser.parse_args(argv)
    chosen, folder = {name: steps[name] for name in arguments.steps}, arguments.out.resolve()
    _conclude(session(chosen, folder, arguments.budget, log), folder)


def writable_folder(text: str) -> Path:
    """A folder that is made if it is not there, given on a command line."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"nothing can be written into {text}: {error.strerror}"
        ) from error
    return folder


def planned(steps: Mapping[str, Step], budget: float) -> list[tuple[str, float, float]]:
    """Of each step its name, the seconds it is expected to take, and the most that it may where
    those before it take what is expected."""
    rows = []
    for name, step in steps.items():
        rows.append((name, step.expected, step.share * budget))
        budget -= step.expected
    return rows


def session(
    steps: Mapping[str, Step], out: Path, budget: float, log: str = EACH_ITS_OWN
) -> list[Ended]:
    """Runs all, and prints the end of each output. What there was no time for says so.

    A benchmark whose process ended within one of its steps is begun again behind that one.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in steps if log != log.format(step="") else ():
        (out / log.format(step=name)).unlink(missing_ok=True)
    end = time.monotonic() + budget
    rows: list[Ended] = []
    for name, step in steps.items():
        seconds = step.share * (end - time.monotonic())
        if seconds <= 1:
            rows.append((name, "no time", 0.0, ""))
            continue
        path = out / log.format(step=name)
        before = path.stat().st_size if path.exists() else 0
        ended, took = _run_whole(name, step, out, path, seconds)
        text = path.read_bytes()[before:].decode(errors="replace")
        print(f"\n-- {name}\n{text[-step.shown :]}", flush=True)
        rows.append((name, ended, took, (text.strip().splitlines() or [""])[-1][:80]))
    return rows


def _run_whole(name: str, step: Step, out: Path, log: Path, seconds: float) -> tuple[str, float]:
    """`_run`, and again as long as it gets further; then the end says so, and is not "passed"."""
    command, lost, before = step.command(out, seconds), 0, None
    if (old := _results(command)) is not None:
        Path(old).unlink(missing_ok=True)
    ended, took = _run(name, command, log, seconds)
    while (at := _under_way(command)) not in (None, before) and seconds - took > _TO_START:
        before, lost = at, lost + 1
        command = step.command(out, seconds - took)
        again = ("env", f"{RESUME_VARIABLE}={_results(command)}", *command)
        ended, more = _run(name, again, log, seconds - took)
        took += more
    return (f"{ended}, {lost} lost" if lost else ended), took


def _results(command: Sequence[str]) -> str | None:
    """The file of results that a benchmark writes."""
    return command[command.index("--json") + 1] if "--json" in command else None


def _under_way(command: Sequence[str]) -> str | None:
    """The step within which its process ended, by that file."""
    path = _results(command)
    if path is None or not Path(path).exists():
        return None
    found: str | None = json.loads(Path(path).read_text(encoding="utf-8")).get("under_way")
    return found


def _run(name: str, command: Sequence[str], log: Path, seconds: float) -> tuple[str, float]:
    start = time.monotonic()
    print(f"== {name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            end = "passed" if status == 0 else f"FAILED ({status})"
        except subprocess.TimeoutExpired:
            end = f"STOPPED after {seconds:.0f} s"
        finally:
            # What it started may live on, and take the time of the next step.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return end, time.monotonic() - start


def _conclude(rows: Sequence[Ended], out: Path) -> None:
    """Prints a table of the steps, which is also `out`/summary.txt.

    Raises:
        SystemExit: with status 1, where a step did not pass.
    """
    table = tabulate(rows, ("step", "end", "seconds", "last line"), floatfmt=".0f")
    (out / "summary.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n{sum(row[2] for row in rows):.0f} s; results and logs lie in {out}")
    if any(end != "passed" for _, end, *_ in rows):
        raise SystemExit(1)
