"""The sections of `bench static`: what is read or predicted, and not timed."""

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
_PREDICTED = ("layer", "M", "configuration", "least", "model", "simulated", "16 bits", "others")
_WORTH_IT = 0.1  # of the time
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


def predictions(content: Content) -> str:
    """A table of each GPU, and how far the two predictions are from each other."""
    rows = content["rows"]
    what = (
        "Predictions: nothing was run. Microseconds of a call by the cost model, and by a "
        "simulation of the machine code with latencies that others measured "
        "(`bench/static/simulate.py`); bf16, weights from device memory, launched by a CUDA graph. "
        "Least: every byte once, or the products. 16 bits: cuBLAS at its best, and a launch. "
        "Others' figures are theirs, on their GPUs; gemlite's charts count launches by the host."
    )
    parts = [what, _agreement(rows)]
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        lines = [_prediction(row) for row in rows if row["gpu"] == gpu]
        parts += [f"{gpu}:", table(lines, _PREDICTED)]
    return paragraphs(*parts)


def _prediction(row: Row) -> list[str]:
    times = [row.get(key) for key in ("ideal", "model", "simulated", "sixteen_bits")]
    numbers = ["" if time is None else f"{time:.1f}" for time in times]
    others = "; ".join(row["published"])
    return [row["layer"], str(row["m"]), row["config"], *numbers, others]


def _agreement(rows: Iterable[Row]) -> str:
    ratios = sorted(row["simulated"] / row["model"] for row in rows if "simulated" in row)
    far = sum(not 0.75 <= ratio <= 1.25 for ratio in ratios)
    return (
        f"Simulated times are {ratios[0]:.2f} to {ratios[-1]:.2f} of the model's, "
        f"{far} of {len(ratios)} further than 25 % from it."
    )


def stream_k(content: Content) -> str:
    """In how many layers stream-K would be worth it, and where it would gain most."""
    parts = []
    for key in ("gain", "simulated_gain"):
        rows = [row for row in content["rows"] if key in row]
        for gpu in dict.fromkeys(row["gpu"] for row in rows):
            here = [row for row in rows if row["gpu"] == gpu]
            many = sum(row[key] >= _WORTH_IT for row in here)
            parts.append(f"{gpu}, {key}: 10 % and more in {many} of {len(here)} cases.")
    keys = ("gpu", "layer", "m", "config", "model", "stream_config", "stream", "gain")
    best = sorted(content["rows"], key=lambda row: -float(row["gain"]))[:10]
    lines = [[_number(row[key]) for key in keys] for row in best]
    return paragraphs(*parts, table(lines, keys))


def _instructions(row: Row) -> float:
    return float(row["instructions_per_weight"])


def _static(rows: Iterable[Row], what: str) -> str:
    lines = [[_number(row.get(key)) for key in _COLUMNS] for row in rows]
    return paragraphs(what, table(lines, list(_COLUMNS.values())))


def _number(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else f"{value:.3g}"
