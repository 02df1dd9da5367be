"""How far the planner is from what was measured: every row of results/ that it has a word on.

    python -m bench planner [--all] [--results FOLDER] [--json FILE]

Nothing of the planner was fitted to these results. An error of +10 % is a tenth more time (or
bytes) predicted than measured; "off by" is the median of the errors without their signs. Without
--all the layers are summed up by the number of rows.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from bench.core.results import RESULTS
from bench.planner.rows import (
    CPU_FLOPS_OF_A_THREAD,
    Compared,
    Machine,
    compared,
    machine_of,
)
from fqcompile.files.trusted import replace_text

HEADERS = ("part", "what", "way", "measured", "predicted", "error")
SUMMARY = ("part", "way", "figures", "off by", "errors from", "to")


def machines(root: Path = RESULTS) -> Iterator[tuple[Machine, dict[str, dict[str, Any]]]]:
    """Each device that results are of, with these by name."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if "identity" in content and "rows" in content:
                found.setdefault(content["identity"]["device"], {})[path.stem] = content
        for device, contents in found.items():
            yield machine_of(device, contents), contents


def comparisons(machine: Machine, contents: dict[str, dict[str, Any]]) -> list[Compared]:
    """All figures of a machine that there is a prediction for."""
    return [row for name, content in contents.items() for row in compared(name, content, machine)]


def figures_table(rows: Sequence[Compared]) -> str:
    """A line for each figure; milliseconds, or MB."""
    lines = [
        (r.part, r.what, r.way, _number(r.measured), _number(r.predicted), f"{r.error:+.0%}")
        for r in rows
    ]
    return tabulate(lines, HEADERS, disable_numparse=True)


def summary_table(rows: Sequence[Compared]) -> str:
    """A line for each part and way, of layers for each number of rows too."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        part = row.part
        if part == "layer":
            part += f", {row.what.split(', ', 1)[1]}"
        groups.setdefault((part, row.way), []).append(row.error)
    lines = [
        (
            *key,
            len(errors),
            f"{median(map(abs, errors)):.0%}",
            f"{min(errors):+.0%}",
            f"{max(errors):+.0%}",
        )
        for key, errors in groups.items()
    ]
    return tabulate(lines, SUMMARY, disable_numparse=True)


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="each layer on a line of its own")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    rows: list[Compared] = []
    for machine, contents in machines(arguments.results):
        if machine.device() is None:
            print(f"{machine.name}: estimator/devices.py has no figures for it\n")
            continue
        found = comparisons(machine, contents)
        shown = [row for row in found if arguments.all or row.part != "layer"]
        print(f"{machine.name}\n\n{figures_table(shown)}\n\n{summary_table(found)}\n")
        rows += found
    flops = CPU_FLOPS_OF_A_THREAD / 1e9
    print(f"assumed of a CPU: {flops:.0f} GFLOP/s of bf16 a thread; its rate of reads was measured")
    if arguments.json:
        content = [asdict(row) | {"error": row.error} for row in rows]
        replace_text(arguments.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
