"""The rows of `bench models` as a table, and what follows from them for a whole model."""

from collections.abc import Iterator, Sequence

from tabulate import tabulate

from bench.results import Row

HEADERS = (
    "model", "phase", "batch", "way", "layers", "ms [p20, p80]", "tokens/s", "over\ninductor",
    "linear\nGiB", "first\ncall s", "error\n(allowed)",
)  # fmt: skip


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
        plain = whole.get("inductor")
        for way, found in ways.items():
            few, many, ms = found[0], found[-1], whole[way]
            if ms is not None and many["layers"] < of_layers:
                keep = ("model", "of_layers", "phase", "batch", "tokens", "way")
                yield {key: many[key] for key in keep} | {
                    "layers": of_layers,
                    "extrapolated_from": [few["layers"], many["layers"]],
                    "ms": ms,
                    "over_inductor": plain and plain / ms,
                }


def _of_all_layers(few: Row, many: Row) -> float | None:
    if few["layers"] == many["layers"] or many["low"] <= few["high"]:
        return None
    layer = (many["ms"] - few["ms"]) / (many["layers"] - few["layers"])
    return float(many["ms"] + (many["of_layers"] - many["layers"]) * layer)


def tokens_per_second(row: Row) -> float:
    """Of the whole batch: a step makes one token of each sequence, a prefill reads them all."""
    tokens = row["tokens"] if row["phase"] == "prefill" else row["batch"]
    return 1e3 * float(tokens) / float(row["ms"])


def model_table(rows: Sequence[Row]) -> str:
    """A line for each row that has a time."""
    lines = []
    for row in rows:
        if "ms" not in row:
            continue
        whole = row["layers"] == row["of_layers"]
        from_layers = row.get("extrapolated_from")
        layers = str(row["layers"]) if whole else f"{row['layers']} of {row['of_layers']}"
        if from_layers:
            layers = f"{row['layers']}, extrapolated from {from_layers[0]} and {from_layers[1]}"
        size = row.get("linear_bytes")
        over = row["over_inductor"]
        lines.append(
            [
                row["model"],
                f"{row['phase']} {row['tokens']}",
                row["batch"],
                row["way"],
                layers,
                f"{row['ms']:.3f}" + ("" if from_layers else _spread(row)),
                f"{tokens_per_second(row):.0f}" if whole else "",
                "" if over is None else f"{over:.2f}x",
                "" if size is None else f"{size / 2**30:.2f}",
                f"{row['first_call_s']:.1f}" if "first_call_s" in row else "",
                f"{row['error']:.2g} ({row['allowed']:.2g})" if "error" in row else "",
            ]
        )
    return tabulate(lines, HEADERS, disable_numparse=True)


def _spread(row: Row) -> str:
    return f" [{row['low']:.3f}, {row['high']:.3f}]"
