"""What `bench models` found: all layers from few, and the section."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from bench.core.results import Row
from bench.core.section import Content, failures, left_out, paragraphs, spread, table

PLAIN = "inductor"  # the way that the others are compared with
LLAMA_CPP = "llama.cpp"
# How often as fast a way is as others: the keys of rows, and the ways.
OVER = {"over_inductor": PLAIN, "over_llama_cpp": LLAMA_CPP}
_LINEAR = ("bytes_read", "ideal_ms")  # in the number of layers, exactly
_GIB = 2**30


def extrapolated(rows: Sequence[Row], name: str, of_layers: int) -> Iterator[Row]:
    """A row of all layers for what was measured with two smaller numbers of them.

    On a straight line through both: the slope is a layer, the rest is the embedding and the head.
    Where the two are no further apart than their spread there is no line to draw.
    """
    measured: dict[tuple[object, ...], dict[str, list[Row]]] = {}
    for row in rows:
        if row["model"] == name and "low" in row:
            key = (row["phase"], row["batch"], row["tokens"], row.get("threads"))
            measured.setdefault(key, {}).setdefault(row["way"], []).append(row)
    for ways in measured.values():
        ends = {way: _fewest_and_most_layers(found) for way, found in ways.items()}
        whole = {way: _of_all_layers(few, many) for way, (few, many) in ends.items()}
        for way, (few, many) in ends.items():
            ms = whole[way]
            if ms is not None and many["layers"] < of_layers:
                keep = ("model", "of_layers", "phase", "batch", "tokens", "new", "threads", "way",
                        "library")  # fmt: skip
                row = {key: many[key] for key in keep if key in many}
                row |= {key: _on_a_line(few, many, key) for key in _LINEAR if key in many}
                if "ideal_ms" in row:
                    row["of_ideal"] = row["ideal_ms"] / ms
                yield row | {
                    "layers": of_layers,
                    "extrapolated_from": [few["layers"], many["layers"]],
                    "ms": ms,
                    **over(ms, whole),
                }


def _fewest_and_most_layers(rows: Sequence[Row]) -> tuple[Row, Row]:
    by_layers = sorted(rows, key=lambda row: row["layers"])
    return by_layers[0], by_layers[-1]


def over(ms: float, found: Mapping[str, float | None]) -> Row:
    """How often as fast as each of OVER: None where there is no time of it."""
    return {key: other and other / ms for key, way in OVER.items() for other in [found.get(way)]}


def _of_all_layers(few: Row, many: Row) -> float | None:
    if few["layers"] == many["layers"] or many["low"] <= few["high"]:
        return None
    return _on_a_line(few, many, "ms")


def _on_a_line(few: Row, many: Row, key: str) -> float:
    layer = (many[key] - few[key]) / (many["layers"] - few["layers"])
    return float(many[key] + (many["of_layers"] - many["layers"]) * layer)


def tokens_per_second(row: Row) -> float:
    """Of the whole batch: a step makes one token of each sequence, a prefill reads them all;
    generate() makes its new ones, the prompt's time included."""
    made = {"prefill": row["tokens"], "generate": row.get("new")}
    tokens = made.get(row["phase"], row["batch"])
    return 1e3 * float(tokens) / float(row["ms"])


def work_text(row: Row) -> str:
    """ "decode 512, 1 thread", "generate 64 + 32, 2 threads"; older rows have no threads."""
    text = f"{row['phase']} {row['tokens']}"
    if "new" in row:
        text += f" + {row['new']}"
    threads = row.get("threads")
    return f"{text}, {threads} thread{'s' * (threads > 1)}" if threads else text


def layers_text(row: Row) -> str:
    """ "2 of 32", or all of them, measured or not."""
    if found := row.get("extrapolated_from"):
        return f"{row['layers']}, extrapolated from {found[0]} and {found[1]}"
    whole = row["layers"] == row["of_layers"]
    return str(row["layers"]) if whole else f"{row['layers']} of {row['of_layers']}"


def starts(rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """(cold, warm) of every model and way that has both."""
    cold: dict[tuple[str, int, str], Row] = {}
    for row in rows:
        if "start" not in row or "failure" in row:
            continue
        key = (row["model"], row["layers"], row["way"])
        if row["start"] == "cold":
            cold[key] = row
        elif key in cold:
            yield cold[key], row


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
        key = (row["model"], layers_text(row), work_text(row), str(row["batch"]))
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
    if row.get("over_llama_cpp") and row["way"] != LLAMA_CPP:
        notes.append(f"{row['over_llama_cpp']:.2f}x llama.cpp")
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
    """The table of starts, which results of before `bench startup` and `memory` have."""
    lines = [_start_line(cold, warm) for cold, warm in starts(content["rows"])]
    if not lines:
        return []
    headers = ("model", "layers", "way", "cold, s", "warm, s", "loaded, GiB", "peak", "after")
    what = (
        "From the model in memory to the first result, quantization included, with empty caches "
        "and with filled ones; memory in the second, where our ways keep the packed weights alone:"
    )
    return [what, table(lines, headers)]


def _start_line(cold: Row, warm: Row) -> list[str]:
    seconds = [f"{row['first_call_s']:.1f}" for row in (cold, warm)]
    sizes = [f"{warm[key] / _GIB:.2f}" for key in ("loaded", "peak", "after")]
    return [cold["model"], layers_text(cold), cold["way"], *seconds, *sizes]


def models(content: Content) -> str:
    """Every row, and the starts."""
    rows = [row for row in content["rows"] if "ms" in row]
    compared = [key for key in OVER if any(row.get(key) for row in rows)]
    lines = [_line(row, compared) for row in rows]
    headers = ("model", "layers", "work", "batch", "way", "ms [20th, 80th percentile]", "ms/token",
               *(f"over {OVER[key]}" for key in compared), "GiB read", "ideal, ms", "of ideal",
               "error (allowed)")  # fmt: skip
    what = f"{content['settings']['dtype']}, medians."
    told = [what, table(lines, headers), *_starts(content), failures(content, "way")]
    return paragraphs(*told, left_out(content))


def _line(row: Row, compared: Iterable[str]) -> list[str]:
    ms = spread(row, "ms", 2) if "low" in row else f"{row['ms']:.2f}"
    return [
        row["model"],
        layers_text(row),
        work_text(row),
        str(row["batch"]),
        row["way"] + ", flash attention" * row.get("flash_attention", False),
        ms,
        f"{1e3 / tokens_per_second(row):.3g}",
        *(f"{row[key]:.2f}x" if row.get(key) else "" for key in compared),
        *_ideal_cells(row),
        f"{row['error']:.2g} ({row['allowed']:.2g})" if "error" in row else "",
    ]


def _ideal_cells(row: Row) -> list[str]:
    if "ideal_ms" not in row:
        return ["", "", ""]
    return [f"{row['bytes_read'] / _GIB:.2f}", f"{row['ideal_ms']:.2f}", f"{row['of_ideal']:.0%}"]
