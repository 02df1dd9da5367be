"""The rows of `bench models` as tables, and what follows from them for a whole model."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tabulate import tabulate

from bench.core.results import Row

HEADERS = (
    "model", "phase", "batch", "way", "library", "layers", "ms [p20, p80]", "ms/token", "tokens/s",
    "over\ninductor", "reads\nGiB", "ideal\nms", "of\nideal", "error\n(allowed)",
)  # fmt: skip
START_HEADERS = (
    "model", "layers", "way", "cold s", "of it\nquantising", "warm s", "of it\nquantising",
    "GiB\nloaded", "peak", "after",
)  # fmt: skip
PLAIN = "inductor"  # the way that the others are compared with
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
            key = (row["phase"], row["batch"], row["tokens"])
            measured.setdefault(key, {}).setdefault(row["way"], []).append(row)
    for ways in measured.values():
        whole = {way: _of_all_layers(found[0], found[-1]) for way, found in ways.items()}
        plain = whole.get(PLAIN)
        for way, found in ways.items():
            few, many, ms = found[0], found[-1], whole[way]
            if ms is not None and many["layers"] < of_layers:
                keep = ("model", "of_layers", "phase", "batch", "tokens", "way", "library")
                row = {key: many[key] for key in keep if key in many}
                row |= {key: _on_a_line(few, many, key) for key in _LINEAR if key in many}
                if "ideal_ms" in row:
                    row["of_ideal"] = row["ideal_ms"] / ms
                yield row | {
                    "layers": of_layers,
                    "extrapolated_from": [few["layers"], many["layers"]],
                    "ms": ms,
                    "over_inductor": plain and plain / ms,
                }


def _of_all_layers(few: Row, many: Row) -> float | None:
    if few["layers"] == many["layers"] or many["low"] <= few["high"]:
        return None
    return _on_a_line(few, many, "ms")


def _on_a_line(few: Row, many: Row, key: str) -> float:
    layer = (many[key] - few[key]) / (many["layers"] - few["layers"])
    return float(many[key] + (many["of_layers"] - many["layers"]) * layer)


def tokens_per_second(row: Row) -> float:
    """Of the whole batch: a step makes one token of each sequence, a prefill reads them all."""
    tokens = row["tokens"] if row["phase"] == "prefill" else row["batch"]
    return 1e3 * float(tokens) / float(row["ms"])


def layers_text(row: Row) -> str:
    """ "2 of 32", or all of them, measured or not."""
    if found := row.get("extrapolated_from"):
        return f"{row['layers']}, extrapolated from {found[0]} and {found[1]}"
    whole = row["layers"] == row["of_layers"]
    return str(row["layers"]) if whole else f"{row['layers']} of {row['of_layers']}"


def model_table(rows: Iterable[Row]) -> str:
    """A line for each row that has a time."""
    lines = [_line(row) for row in rows if "ms" in row]
    return tabulate(lines, HEADERS, disable_numparse=True)


def _line(row: Row) -> list[Any]:
    whole = row["layers"] == row["of_layers"]
    rate = tokens_per_second(row)
    spread = f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
    return [
        row["model"],
        f"{row['phase']} {row['tokens']}",
        row["batch"],
        row["way"],
        row.get("library", ""),
        layers_text(row),
        f"{row['ms']:.3f}{spread}",
        f"{1e3 / rate:.3g}",
        f"{rate:.0f}" if whole else "",
        _given(row, "over_inductor", "{:.2f}x"),
        _given(row, "bytes_read", "{:.2f}", _GIB),
        _given(row, "ideal_ms", "{:.3f}"),
        _given(row, "of_ideal", "{:.0%}"),
        f"{row['error']:.2g} ({row['allowed']:.2g})" if "error" in row else "",
    ]


def _given(row: Row, key: str, text: str, unit: float = 1.0) -> str:
    value = row.get(key)
    return "" if value is None else text.format(value / unit)


def start_table(rows: Iterable[Row]) -> str:
    """A line for each way: both starts, and the memory of the second."""
    lines = [_start_line(*pair) for pair in starts(rows)]
    return tabulate(lines, START_HEADERS, disable_numparse=True)


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


def _start_line(cold: Row, warm: Row) -> list[Any]:
    seconds = [
        text
        for row in (cold, warm)
        for text in (f"{row['first_call_s']:.1f}", _given(row, "quantize_s", "{:.1f}"))
    ]
    sizes = [f"{warm[key] / _GIB:.3g}" for key in ("loaded", "peak", "after")]
    return [cold["model"], layers_text(cold), cold["way"], *seconds, *sizes]
