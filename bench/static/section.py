"""The section of `bench static`: what is read, and not timed."""

import re
from collections.abc import Iterable

from bench.core.results import Row
from bench.core.section import Content, paragraphs, table

_COLUMNS = {
    "kernel": "kernel",
    "instructions_per_weight": "instructions per weight",
    "kb_in_flight": "KiB on the way per SM",
    "issue": "issue bound, TB/s of weights",
    "memory": "memory, TB/s",
}
# The kernels that decode: 4 bits in groups of 128 and bf16, up to 16 rows, K not split.
_DECODING = re.compile(
    r"((?:gemm|plain|gathered|grouped) .*?w4 (?:normal )?g128 bf16) 16x\d+x\d+x1w\ds\d(.*)"
)


def static(content: Content) -> str:
    """Every kernel that was read."""
    return _static(content["rows"], "Nothing was run: this is what the machine code says.")


def static_short(content: Content) -> str:
    """Of the kernels that decode the tile with the fewest instructions; "plain" is the usual form,
    unpacked and scaled before `x @ w`."""
    best: dict[str, Row] = {}
    for row in content["rows"]:
        if found := _DECODING.fullmatch(row["kernel"]):
            kind = " ".join("".join(found.groups()).split())
            known = best.get(kind)
            if known is None or _instructions(row) < _instructions(known):
                best[kind] = {**row, "kernel": kind}
    what = (
        "Nothing was run: this is what the machine code says. Up to 16 rows; plain is the usual "
        "form, unpacked and scaled before `x @ w`."
    )
    return _static(best.values(), what)


def _instructions(row: Row) -> float:
    return float(row["instructions_per_weight"])


def _static(rows: Iterable[Row], what: str) -> str:
    lines = [[_number(row.get(key)) for key in _COLUMNS] for row in rows]
    return paragraphs(what, table(lines, list(_COLUMNS.values())))


def _number(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else f"{value:.3g}"
