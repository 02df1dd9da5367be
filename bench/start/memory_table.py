"""The rows of `bench memory` as a table."""

from collections.abc import Sequence

from tabulate import tabulate

from bench.core.results import Row

PLAIN = "bf16"  # the way that the others are compared with
_MIB = 2**20


def memory_table(rows: Sequence[Row]) -> str:
    """MiB beyond those of the imports; "of bf16" compares with the plain model."""
    plain = next((row for row in rows if row["way"] == PLAIN and "failure" not in row), None)
    lines = []
    for row in rows:
        if "failure" in row:
            continue
        figures = [f"{row[key] / _MIB:.0f}" for key in ("loaded", "peak", "after", "own")]
        shares = [f"{row[key] / plain[key]:.2f}" if plain else "" for key in ("peak", "after")]
        imports = f"{row['imports'] / _MIB:.0f}"
        lines.append([row["way"], *figures, *shares, imports, f"{row.get('error', 0):.3f}"])
    headers = ["way", "loaded", "peak", "after", "own", "peak\nof bf16", "after\nof bf16"]
    return tabulate(lines, [*headers, "imports", "error"], disable_numparse=True)
