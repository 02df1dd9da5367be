"""The rows of `bench kernels` as one table: a line for each layer and M, a column for each way."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from bench.core.results import Row
from bench.core.shapes import OURS

Key = tuple[int, int, int]


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


def kernel_table(rows: Sequence[Row]) -> str:
    """Microseconds; "of ideal" and "over cuBLAS" are of the fastest of ours."""
    names = timed_names(rows)
    spread = "spread"
    headers = ["layer", "M", "ideal", *names, "of ideal", "over cuBLAS", spread, "ours"]
    headers = [text.replace(" ", "\n") for text in headers]
    lines = []
    for (n, k, m), ways in by_layer(rows).items():
        best = our_best(ways)
        timed = [row for row in ways.values() if "us" in row]
        widest = max(((row["high"] - row["low"]) / row["us"] for row in timed), default=None)
        ideal = next(iter(ways.values()))["ideal_us"]
        times = [_number(ways.get(name, {}).get("us")) for name in names]
        over = best and best["over_cublas"]
        lines.append(
            [
                f"{n}x{k}",
                m,
                _number(ideal),
                *times,
                "" if best is None else f"{best['of_ideal']:.0%}",
                "" if over is None else f"{over:.2f}x",
                "" if widest is None else f"{widest:.1%}",
                "" if best is None else best["detail"].partition(":")[2],
            ]
        )
    return tabulate(lines, headers, disable_numparse=True)


def failure_lines(rows: Iterable[Row]) -> list[str]:
    """Each reason that a contender gives, with where it gave it; shortly where it is everywhere."""
    places: dict[tuple[str, str], list[str]] = {}
    layers = set()
    for row in rows:
        place = f"{row['n']}x{row['k']} M={row['m']}"
        layers.add(place)
        if "failure" in row:
            places.setdefault((row["contender"], row["failure"]), []).append(place)
    lines = []
    for (name, reason), where in places.items():
        everywhere = len(where) == len(layers)
        lines.append(f"{name}: {reason}" + ("" if everywhere else f" ({', '.join(where)})"))
    return lines


def _number(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:.1f}"
