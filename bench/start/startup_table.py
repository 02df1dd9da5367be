"""The rows of `bench startup`: medians over the rounds, and their table."""

from collections.abc import Sequence
from statistics import median

from tabulate import tabulate

from bench.core.results import Row

# Of the first call; the rest of it is Dynamo's, its guards, and ours in between.
PARTS = ("digest", "quantise", "write", "read", "pack", "x86 build", "compile", "run")


def medians(rows: Sequence[Row]) -> dict[str, Row]:
    """{"finequant, warm": {part: seconds}} over the rounds; starts that failed are not there."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "failure" not in row:
            found.setdefault(f"{row['backend']}, {row['caches']}", []).append(row["seconds"])
    return {
        name: {part: median(row[part] for row in starts) for part in starts[0]}
        for name, starts in found.items()
    }


def startup_table(rows: Sequence[Row]) -> str:
    """Seconds; "of cold" with the imports and without."""
    found = medians(rows)
    lines = []
    for name, row in found.items():
        cold = found.get(f"{name.partition(',')[0]}, cold", row)
        shares = [f"{row[key] / cold[key]:.2f}" for key in ("total", "first call")]
        seconds = [row[key] for key in ("total", "import", "first call", "dynamo", *PARTS)]
        lines.append([name, *(f"{s:.2f}" for s in seconds), *shares])
    headers = ["start", "total", "import", "first call", "dynamo", *PARTS]
    headers += ["total of cold", "call of cold"]
    return tabulate(lines, [h.replace(" ", "\n") for h in headers], disable_numparse=True)
