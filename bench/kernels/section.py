"""The sections of `bench kernels`, on a GPU and on a CPU: a line for each layer and M."""

from collections import Counter
from collections.abc import Iterable, Sequence

from bench.core.results import Row
from bench.core.section import Content, failures, left_out, paragraphs, spread, table
from bench.core.shapes import OURS

Key = tuple[int, int, int]
CPU_OURS = "fqcompile bf16"
_NARROW = "fp32"  # ways in fp32 are in the whole table alone


def by_layer(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """{(n, k, m): {contender: row}} in the order met."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["n"], row["k"], row["m"]), {})[row["contender"]] = row
    return found


def timed_names(rows: Sequence[Row]) -> list[str]:
    """The contenders that have a time anywhere."""
    return list(dict.fromkeys(row["contender"] for row in rows if "us" in row))


def our_best(ways: dict[str, Row]) -> Row | None:
    """The fastest of ours that has a time."""
    ours = [row for name, row in ways.items() if name.startswith(OURS) and "us" in row]
    return min(ours, key=lambda row: row["us"], default=None)


def gpu_kernels(content: Content) -> str:
    """Microseconds of each contender; ours is the fastest of our ways. Losses are shown."""
    rows: list[Row] = content["rows"]
    others = [name for name in timed_names(rows) if not name.startswith(OURS)]
    headers = ["layer", "M", OURS, "of ideal", *others, "over cuBLAS", "ours"]
    lines = []
    for (n, k, m), ways in by_layer(rows).items():
        best = our_best(ways)
        if best is None:
            continue
        over = best["over_cublas"]
        times = [spread(ways.get(name, {}), "us") for name in others]
        ratio = "" if over is None else f"{over:.2f}x"
        share = f"{best['of_ideal']:.0%}"
        config = best["detail"].partition(":")[2]
        lines.append([f"{n} x {k}", m, spread(best, "us"), share, *times, ratio, config])
    s = content["settings"]
    what = f"int{s['bits']}, group {s['group']}, {s['dtype']}; µs, medians [20th, 80th percentile]."
    told = failures(content, "contender")
    return paragraphs(what, table(lines, headers), told, left_out(content))


def cpu_kernels(content: Content) -> str:
    """All layers, all ways, with their spread."""
    rows: list[Row] = content["rows"]
    body = _cpu_table(rows, timed_names(rows), _read_rates(content), spreads=True)
    return paragraphs(_cpu_words(content), body, slower(rows), left_out(content))


def cpu_kernels_short(content: Content) -> str:
    """Of each set of shapes the largest layer, on the fewest threads, without the ways in fp32."""
    rows: list[Row] = content["rows"]
    threads = min(row["threads"] for row in rows)
    largest: dict[str, tuple[int, int]] = {}
    for row in rows:
        size = (row["n"], row["k"])
        largest[row["shapes"]] = max(size, largest.get(row["shapes"], size), key=_weights)
    shown = [r for r in rows if r["threads"] == threads and _side(r) in largest.values()]
    names = [name for name in timed_names(shown) if not name.endswith(_NARROW)]
    which = f"The largest layer of each set, {_threads(threads)}:"
    body = _cpu_table(shown, names, _read_rates(content), spreads=False)
    return paragraphs(f"{_cpu_words(content)} {which}", body, slower(rows))


def _weights(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _side(row: Row) -> tuple[int, int]:
    return row["n"], row["k"]


def _read_rates(content: Content) -> dict[int, float]:
    """Bytes a second by number of threads."""
    return {int(t): rate for t, rate in content["settings"]["read_bandwidth"].items()}


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _cpu_table(
    rows: Sequence[Row], names: Sequence[str], rates: dict[int, float], spreads: bool
) -> str:
    details = {row["contender"]: row["detail"] for row in rows if "detail" in row}
    lines = []
    for (n, k, m, threads), ways in cpu_layers(rows).items():
        least = min((row["us"] for row in ways.values() if "us" in row), default=None)
        cells = [_cpu_cell(ways.get(name, {}), least, spreads) for name in names]
        known = m == 1 and CPU_OURS in ways
        read = f"{read_share(ways[CPU_OURS], rates):.0%}" if known else ""
        lines.append([f"{n} x {k}", m, threads, *cells, read])
    headers = ("layer", "M", "threads", *(_named(name, details[name]) for name in names))
    return table(lines, (*headers, "read rate"))


def _cpu_words(content: Content) -> str:
    s = content["settings"]
    rates = _read_rates(content).items()
    reads = ", ".join(f"{rate / 1e9:.1f} GB/s on {_threads(t)}" for t, rate in rates)
    return (
        f"int{s['bits']}, group {s['group']}, each call on weights that no cache holds; µs, "
        f"medians, the fastest in bold. Read rate: the packed weight's bytes over our time in "
        f"bf16, of what this machine reads ({reads})."
    )


def _named(name: str, detail: str) -> str:
    return name if name.startswith(OURS) else f"{name} ({detail.partition('+')[0]})"


def _cpu_cell(row: Row, least: float | None, spreads: bool) -> str:
    if "us" not in row:
        return ""
    text = spread(row, "us", 0) if spreads else f"{row['us']:.0f}"
    return f"**{text}**" if row["us"] == least else text


def cpu_layers(rows: Iterable[Row]) -> dict[tuple[int, int, int, int], dict[str, Row]]:
    """{(n, k, m, threads): {contender: row}}."""
    found: dict[tuple[int, int, int, int], dict[str, Row]] = {}
    for row in rows:
        key = (row["n"], row["k"], row["m"], row["threads"])
        found.setdefault(key, {})[row["contender"]] = row
    return found


def read_share(row: Row, rates: dict[int, float]) -> float:
    """Of the rate at which this machine reads, that of the packed weight."""
    return float(row["bytes"]) / (float(row["us"]) * 1e-6) / rates[row["threads"]]


def slower(rows: Iterable[Row]) -> str:
    """Who is faster than ours in bf16, at which M and in how many of the layers."""
    beaten: Counter[tuple[str, int]] = Counter()
    layers: Counter[int] = Counter()
    for (_, _, m, _), ways in cpu_layers(rows).items():
        ours = ways.get(CPU_OURS, {}).get("us")
        if ours is None:
            continue
        layers[m] += 1
        for name, row in ways.items():
            if not name.startswith(OURS) and row.get("us", ours) < ours:
                beaten[name, m] += 1
    told = [f"{name} at M = {m} in {n} of {layers[m]} layers" for (name, m), n in beaten.items()]
    return f"Faster than ours: {'; '.join(told)}." if told else "None is faster than ours."
