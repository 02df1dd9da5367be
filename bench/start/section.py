"""The sections of `bench memory` and `startup`."""

from collections.abc import Iterable, Sequence
from statistics import median

from bench.core.results import Row
from bench.core.section import Content, failures, paragraphs, table

PLAIN = "bf16"  # the way of `bench memory` that the others are compared with
_MIB = 2**20


def memory(content: Content) -> str:
    """MiB beyond what importing takes; each way in a process of its own."""
    rows: list[Row] = [row for row in content["rows"] if "failure" not in row]
    plain = next((row for row in rows if row["way"] == PLAIN), None)
    lines = []
    for row in rows:
        sizes = [f"{row[key] / _MIB:.0f}" for key in ("loaded", "peak", "after")]
        share = f"{row['peak'] / plain['peak']:.2f}" if plain else ""
        library = f" ({row['library']})" if "library" in row else ""
        lines.append([f"{row['way']}{library}", *sizes, share])
    headers = ("way", "after loading", "peak", "after the first result", "peak over bf16")
    s = content["settings"]
    what = f"MiB beyond what imports take, a Llama of {s['layers']} layers and hidden size 4096."
    return paragraphs(what, table(lines, headers), failures(content, "way"))


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


def startup(content: Content) -> str:
    """Seconds from the creation of the process to the first result, and the parts of it."""
    rows: list[Row] = content["rows"]
    found = medians(rows)
    parts = ("total", "import", "first call", "quantize", "x86 build", "compile")
    lines = [[name, *(f"{row[part]:.1f}" for part in parts)] for name, row in found.items()]
    s = content["settings"]
    rounds = _times(s["rounds"])
    what = (
        f"Seconds from the creation of the process to the first result, without making the model "
        f"(2 layers of hidden size 4096 and the head, bf16, a prompt of 16 tokens); {rounds}."
    )
    told = _failed_starts(rows)
    return paragraphs(what, table(lines, ("start", *parts)), told)


def _times(rounds: int) -> str:
    return "one round" if rounds == 1 else f"medians of {rounds} rounds"


def _failed_starts(rows: Iterable[Row]) -> str:
    told = [f"{r['backend']}, {r['caches']}: {r['failure']}" for r in rows if "failure" in r]
    return f"No figure: {'; '.join(told)}." if told else ""
