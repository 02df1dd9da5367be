"""The sections of `bench models`, `memory` and `startup`."""

from collections.abc import Iterable, Sequence

from bench.core.results import Row
from bench.core.section import Content, failures, left_out, paragraphs, spread, table
from bench.models.table import PLAIN, layers_text, starts, tokens_per_second
from bench.start.memory_table import PLAIN as PLAIN_MEMORY
from bench.start.startup_table import medians

_MIB, _GIB = 2**20, 2**30


def models_short(content: Content) -> str:
    """A line for each work, a column for each way: of each model all layers, and the most that were
    measured."""
    rows: list[Row] = [row for row in content["rows"] if "ms" in row]
    most: dict[str, int] = {}
    for row in rows:
        if "extrapolated_from" not in row:
            most[row["model"]] = max(row["layers"], most.get(row["model"], 0))
    shown = [r for r in rows if r["layers"] in (r["of_layers"], most.get(r["model"]))]
    works: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in shown:
        key = (row["model"], layers_text(row), f"{row['phase']} {row['tokens']}", str(row["batch"]))
        works.setdefault(key, {})[row["way"]] = row
    ways = list(dict.fromkeys(row["way"] for row in shown))
    lines = [[*key, *(_cell(found.get(way)) for way in ways)] for key, found in works.items()]
    headers = ("model", "layers", "work", "batch", *_with_libraries(shown, ways))
    what = f"{content['settings']['dtype']}, milliseconds a step or prompt: medians."
    told = [what, _ideal_words(shown), table(lines, headers), *_starts(content)]
    return paragraphs(*told, left_out(content))


def _cell(row: Row | None) -> str:
    """ "25.5 (3.9x, 61 % of ideal, 39 tokens/s)", as far as these are known."""
    if row is None:
        return ""
    notes = []
    if row["over_inductor"] is not None and row["way"] != PLAIN:
        notes.append(f"{row['over_inductor']:.2f}x")
    if "of_ideal" in row:
        notes.append(f"{row['of_ideal']:.0%}")
    if row["layers"] == row["of_layers"]:
        notes.append(f"{_rate(row)} tokens/s")
    return f"{row['ms']:.2f}" + (f" ({', '.join(notes)})" if notes else "")


def _rate(row: Row) -> str:
    rate = tokens_per_second(row)
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _with_libraries(rows: Sequence[Row], ways: Sequence[str]) -> list[str]:
    libraries = {row["way"]: str(row["library"]) for row in rows if "library" in row}
    named = {way: f" ({library.partition('+')[0]})" for way, library in libraries.items()}
    return [f"{way}{named.get(way, '')}" for way in ways]


def _ideal_words(rows: Sequence[Row]) -> str:
    if not any("of_ideal" in row for row in rows):
        return ""
    return (
        "Percent: of the least time that reading the weights as each way holds them and the "
        "context, or the products, allow."
    )


def _starts(content: Content) -> list[str]:
    """The table of starts, where they were measured."""
    lines = [_start_line(cold, warm) for cold, warm in starts(content["rows"])]
    if not lines:
        return []
    headers = ("model", "layers", "way", "cold, s", "warm, s", "loaded, GiB", "peak", "after")
    what = (
        "From the model in memory to the first result, quantisation included, with empty caches "
        "and with filled ones; memory in the second, where our ways keep the packed weights alone:"
    )
    return [what, table(lines, headers)]


def _start_line(cold: Row, warm: Row) -> list[str]:
    seconds = [f"{row['first_call_s']:.1f}" for row in (cold, warm)]
    sizes = [f"{warm[key] / _GIB:.2f}" for key in ("loaded", "peak", "after")]
    return [cold["model"], layers_text(cold), cold["way"], *seconds, *sizes]


def models(content: Content) -> str:
    """Every row, and the starts."""
    lines = [_line(row) for row in content["rows"] if "ms" in row]
    headers = ("model", "layers", "work", "batch", "way", "ms [20th, 80th percentile]", "ms/token",
               "over inductor", "GiB read", "ideal, ms", "of ideal", "error (allowed)")  # fmt: skip
    what = f"{content['settings']['dtype']}, medians."
    told = [what, table(lines, headers), *_starts(content), failures(content, "way")]
    return paragraphs(*told, left_out(content))


def _line(row: Row) -> list[str]:
    over = row["over_inductor"]
    ms = spread(row, "ms", 2) if "low" in row else f"{row['ms']:.2f}"
    return [
        row["model"],
        layers_text(row),
        f"{row['phase']} {row['tokens']}",
        str(row["batch"]),
        row["way"],
        ms,
        f"{1e3 / tokens_per_second(row):.3g}",
        "" if over is None else f"{over:.2f}x",
        *_ideal_cells(row),
        f"{row['error']:.2g} ({row['allowed']:.2g})" if "error" in row else "",
    ]


def _ideal_cells(row: Row) -> list[str]:
    if "ideal_ms" not in row:
        return ["", "", ""]
    return [f"{row['bytes_read'] / _GIB:.2f}", f"{row['ideal_ms']:.2f}", f"{row['of_ideal']:.0%}"]


def memory(content: Content) -> str:
    """MiB beyond what importing takes; each way in a process of its own."""
    rows: list[Row] = [row for row in content["rows"] if "failure" not in row]
    plain = next((row for row in rows if row["way"] == PLAIN_MEMORY), None)
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


def startup(content: Content) -> str:
    """Seconds from the creation of the process to the first result, and the parts of it."""
    rows: list[Row] = content["rows"]
    found = medians(rows)
    parts = ("total", "import", "first call", "quantise", "x86 build", "compile")
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
