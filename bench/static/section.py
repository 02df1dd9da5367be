"""The sections of what is read or compared and not timed: `bench static` and `expert_forms`."""

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
# The kernels that decode: int4 in groups of 128 and bf16, up to 16 rows, K not split.
_DECODING = re.compile(r"((?:gemm|plain|gathered|grouped) .*?w4 g128 bf16) 16x\d+x\d+x1w\ds\d(.*)")


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


def expert_forms(content: Content) -> str:
    """Every model in each of its forms."""
    lines = [_form_line(row["model"], row["form"], [row]) for row in content["rows"]]
    return _forms(content, lines)


def expert_forms_short(content: Content) -> str:
    """A line for each model."""
    by_model: dict[str, list[Row]] = {}
    for row in content["rows"]:
        by_model.setdefault(row["model"], []).append(row)
    lines = [
        _form_line(model, ", ".join(row["form"] for row in rows), rows)
        for model, rows in by_model.items()
    ]
    return _forms(content, lines)


def _form_line(model: str, forms: str, rows: list[Row]) -> list[str]:
    done, stacks = (sum(int(row["stacks"].split("/")[i]) for row in rows) for i in (0, 1))
    share, error = min(row["share"] for row in rows), max(row["error"] for row in rows)
    return [model, forms, f"{done} of {stacks}", f"{share:.1%}", f"{error:.0e}"]


def _forms(content: Content, lines: list[list[str]]) -> str:
    headers = ("model", "experts as", "stacks quantised", "share of bytes, least", "error, most")
    what = (
        f"Small random models in {content['settings']['dtype']}, one graph each; the error is "
        "against the dequantised weights, of the largest logit."
    )
    return paragraphs(what, table(lines, headers))
