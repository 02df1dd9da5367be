"""The README's table: five figures of each device that has results, losses included.

Decoding, a layer with many rows, memory, quality, first start: each beside PyTorch in 16
bits (whole models under Inductor) and beside the best other library in the same run.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from bench.core.results import RESULTS, Row, stored
from bench.core.section import Content, paragraphs, table

_MIB = 2**20
_HEADERS = ("", "PyTorch, 16 bits", "fqcompile", "other libraries")
_OURS = {"int8": "int8", "int4": "int4", "int4 head": "int4 (head too)"}  # names of rows, and shown
_QUALITY = {
    "int4 normal adaptive, synthetic": "int4",
    "int4 normal g64, gptq": "by GPTQ",
    "int4 normal g64": "uncalibrated",
    "int4 uniform g64": "uniform levels",
}
_WORK = ("model", "tokens", "batch", "threads")
Line = tuple[str, str, str, str]


def summary(root: Path = RESULTS) -> str:
    """A table for each device; nothing where nothing is stored."""
    by_device: dict[str, list[Line]] = {}
    for name, lines_of in _KINDS.items():
        for content in stored(name, root):
            about = content["identity"]
            device = f"{about['device']}, torch {about['torch']}"
            by_device.setdefault(device, []).extend(lines_of(content))
    parts = [paragraphs(f"{d}:", table(lines, _HEADERS)) for d, lines in by_device.items() if lines]
    return paragraphs(*parts)


def _decoding(content: Content) -> Iterator[Line]:
    """The first work of the model with the most layers that were measured and not extrapolated."""
    rows: list[Row] = [
        row for row in content["rows"]
        if row.get("phase") == "decode" and "ms" in row and "extrapolated_from" not in row
    ]  # fmt: skip
    most = max((row["layers"] for row in rows), default=0)
    works = [(*map(row.get, _WORK), row) for row in rows if row["layers"] == most]
    by_way = {row["way"]: row for *work, row in works if work == [*works[0][:-1]]}
    if not {"inductor", "int4"} <= by_way.keys():
        return
    plain = by_way["inductor"]
    ours = [
        f"{name} {by_way[way]['ms']:.1f} ms ({plain['ms'] / by_way[way]['ms']:.2f}x)"
        for way, name in _OURS.items()
        if way in by_way
    ]
    heads = {"torchao int4": " (head too)", "llama.cpp": ""}
    others = [f"{way}{heads[way]} {r['ms']:.1f} ms" for way, r in by_way.items() if way in heads]
    whole = most == plain["of_layers"]
    part = "" if whole else f"{most} of {plain['of_layers']} layers of "
    what = f"decode a token: {part}{plain['model']}" + " and the head" * (not whole)
    what += f", batch {plain['batch']}, bf16"
    if threads := plain.get("threads"):
        what += f", {threads} thread{'s' * (threads > 1)}"
    yield what, f"Inductor {plain['ms']:.1f} ms", ", ".join(ours), ", ".join(others)


def _many_rows(content: Content) -> Iterator[Line]:
    """The largest layer with the most rows, where products are the limit and not memory."""
    rows: list[Row] = [r for r in content["rows"] if "us" in r and r["shapes"] != "experts"]
    if not rows:
        return
    most = max(row["m"] for row in rows)
    n, k = max(((r["n"], r["k"]) for r in rows if r["m"] == most), key=lambda s: s[0] * s[1])
    layer = [row for row in rows if (row["n"], row["k"], row["m"]) == (n, k, most)]
    threads = min(row["threads"] for row in layer)
    ms = {r["contender"]: r["us"] / 1e3 for r in layer if r["threads"] == threads}
    others = {name: time for name, time in ms.items() if not name.startswith("fqcompile")}
    plain, ours = others.pop("F.linear bf16", None), ms.get("fqcompile bf16")
    if plain is None or ours is None or not others:
        return
    fastest = min(others, key=lambda name: others[name])
    what = f"a layer of {n} x {k} with {most} rows, bf16, {threads} thread{'s' * (threads > 1)}"
    yield (
        what, f"{plain:.0f} ms", f"int4 {ours:.0f} ms ({plain / ours:.2f}x)",
        f"{fastest} {others[fastest]:.0f} ms ({plain / others[fastest]:.2f}x)",
    )  # fmt: skip


def _memory(content: Content) -> Iterator[Line]:
    """Peak and rest of quantizing in place, and of loading what was saved."""
    found = {row["way"]: row for row in content["rows"] if "failure" not in row}
    cells = {
        way: f"{row['peak'] / _MIB:.0f} / {row['after'] / _MIB:.0f} MiB"
        for way, row in found.items()
    }
    if not {"bf16", "quantize_", "load"} <= cells.keys():
        return
    layers = content["settings"]["layers"]
    what = f"memory, peak / after the first result: {layers} layers of hidden size 4096, int4"
    ours = f"`quantize_` {cells['quantize_']}; `load` {cells['load']}"
    yield what, cells["bf16"], ours, f"torchao {cells['torchao']}" if "torchao" in cells else ""


def _quality(content: Content) -> Iterator[Line]:
    """Divergence of Gemma's predictions: by default, by GPTQ, what they began from; libraries."""
    rows = {row["way"]: row for row in content["rows"] if row["model"] == "gemma"}
    ours = [f"{name} {_divergence(rows[way])}" for way, name in _QUALITY.items() if way in rows]
    others = [f"{way} {_divergence(row)}" for way, row in rows.items() if not way.startswith("int")]
    if ours:
        what = "divergence of predictions from the unquantized model, nats per token: Gemma 3 270M"
        yield what, "0", "; ".join(ours), "; ".join(others)


def _divergence(row: Row) -> str:
    return f"{row['divergence']:.3f} at {row['bits_per_weight']:.2f} bits"


def _start(content: Content) -> Iterator[Line]:
    """The first start ever, which quantizes, and the second, which finds what it left."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for row in content["rows"]:
        key = (row["backend"], row["caches"])
        seconds.setdefault(key, []).append(row["seconds"]["total"])
    cells = []
    for backend in ("inductor", "finequant"):
        if (backend, "cold") not in seconds or (backend, "warm") not in seconds:
            return
        times = [sorted(seconds[backend, caches]) for caches in ("cold", "warm")]
        cells.append(" / ".join(f"{found[len(found) // 2]:.1f} s" for found in times))
    what = "process start to first result, first / second time: the same model"
    yield what, f"Inductor {cells[0]}", cells[1], ""


# The files of results, by the order of the lines.
_KINDS: dict[str, Callable[[Content], Iterator[Line]]] = {
    "models-cpu-gemma": _decoding,
    "models-cpu": _decoding,
    "kernels-cpu": _many_rows,
    "memory": _memory,
    "accuracy-draws": _quality,
    "startup": _start,
}
