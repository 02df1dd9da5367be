"""The tables of docs/guide/choosing.md: what an option gives and what it costs, by the results.

A row has an option as its user writes it, beside the way of the results that measured it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.core.results import RESULTS, Row, stored
from bench.core.section import Content, paragraphs, place, table

_MIB = 2**20
_QUALITY = {
    "`bits=8, granularity=128`": "int8 g128",
    "the defaults": "int4 normal adaptive, synthetic",
    "`granularity=32`": "int4 normal g32, synthetic",
    "`granularity=64`": "int4 normal g64, synthetic",
    "`granularity=128`": "int4 normal g128, synthetic",
    '`granularity="column"`': "int4 normal column, synthetic",
    '`granularity="range"`': "int4 normal range, synthetic",
    "`granularity=64`, `calibration=` a text": "int4 normal g64, text",
    "`granularity=64, calibration=None`": "int4 normal g64",
    '`granularity=64, levels="uniform"`': "int4 uniform g64, synthetic",
    '`granularity=64, method="gptq"`, `calibration=` a text': "int4 normal g64, gptq",
    "HQQ, groups of 64": "hqq g64",
    "bitsandbytes NF4, groups of 64": "nf4 g64",
    "torchao int4, groups of 64": "torchao g64",
    "llama.cpp Q4_K_M": "llama.cpp q4_k_m",
}
_MODELS = ("gemma", "MiniLM")
_WAYS = {
    "Inductor, 16 bits": "inductor",
    "`bits=8`": "int8",
    "the defaults": "int4",
    '`overrides={"lm_head": {"bits": 4}}`': "int4 head",
    "torchao int4, 4 bits in the head too": "torchao int4",
    "llama.cpp": "llama.cpp",
}
_LAYER = (11008, 4096)
_CONTENDERS = {
    "PyTorch, 16 bits": "F.linear bf16",
    "`granularity=128`": "fqcompile bf16",
    "OpenVINO, 8-bit activations": "openvino int8",
}
_MEMORY = {
    "no quantization": "bf16",
    '`torch.compile(model, backend="finequant")`': "finequant",
    "`fqcompile.quantize_(model)`": "quantize_",
    "`fqcompile.load(None, directory)`": "load",
    "torchao int4": "torchao",
}
_STARTS = {
    "Inductor, 16 bits": ("inductor", "cold", "warm"),
    "the defaults": ("finequant", "cold", "warm"),
    "the defaults, with `FQCOMPILE_CACHE_SIZE=0`": ("finequant", "cold", "warm, no weights"),
}


def choices(root: Path = RESULTS) -> dict[str, str]:
    """{name: what stands between <!-- bench:name --> and <!-- /bench:name -->}."""
    found = {}
    for name, (file, show) in _TABLES.items():
        texts = [paragraphs(show(c), f"{_where(c)}.") for c in stored(file, root)]
        found[f"choices-{name}"] = paragraphs(*texts)
    return found


def _where(content: Content) -> str:
    """Without the command, which docs/results.md has."""
    return place(content).partition(": `")[0]


def _quality(content: Content) -> str:
    rows = {(row["model"], row["way"]): row for row in content["rows"]}
    lines = []
    for option, way in _QUALITY.items():
        found = [rows.get((model, way)) for model in _MODELS]
        bits = sorted(f"{row['bits_per_weight']:.2f}" for row in found if row)
        cells = [f"{row['divergence']:.4f}" if row else "" for row in found]
        if bits:
            lines.append((option, " to ".join(dict.fromkeys(bits)), *cells))
    headers = ("option", "bits per weight", "Gemma 3 270M", "MiniLM")
    return table(lines, headers)


def _decoding(content: Content) -> str:
    """Milliseconds a token, of the most layers that were measured, on one thread where that is
    said."""
    rows: list[Row] = [
        row for row in content["rows"]
        if row.get("phase") == "decode" and "ms" in row and "extrapolated_from" not in row
        and row.get("threads") in (None, 1)
    ]  # fmt: skip
    most = max(row["layers"] for row in rows)
    ms = {(r["way"], r["tokens"]): r["ms"] for r in rows if r["layers"] == most}
    contexts = sorted({tokens for _, tokens in ms})
    lines = [
        (name, *(_times(ms, way, _WAYS["Inductor, 16 bits"], tokens) for tokens in contexts))
        for name, way in _WAYS.items()
        if any((way, tokens) in ms for tokens in contexts)
    ]
    return table(lines, ("option", *(f"after {tokens} tokens" for tokens in contexts)))


def _times(ms: Mapping[tuple[str, int], float], way: str, plain: str, work: int) -> str:
    """ "12.0 ms (6.01x)": and how often as fast as what is not quantized."""
    if (way, work) not in ms:
        return ""
    ratio = "" if way == plain else f" ({ms[plain, work] / ms[way, work]:.2f}x)"
    return f"{ms[way, work]:.1f} ms{ratio}"


def _rows(content: Content) -> str:
    """A layer with one row, as in decoding, and with many, as in a prompt or a large batch."""
    ms = {
        (row["contender"], row["m"]): row["us"] / 1e3
        for row in content["rows"]
        if (row["n"], row["k"]) == _LAYER and row["threads"] == 1 and "us" in row
    }
    counts = sorted({m for _, m in ms})
    plain = _CONTENDERS["PyTorch, 16 bits"]
    lines = [
        (name, *(_times(ms, way, plain, m) for m in counts)) for name, way in _CONTENDERS.items()
    ]
    return table(lines, ("option", *(f"{m} row{'s' * (m > 1)}" for m in counts)))


def _memory(content: Content) -> str:
    rows = {row["way"]: row for row in content["rows"] if "failure" not in row}
    lines = [
        (option, *(f"{rows[way][key] / _MIB:.0f} MiB" for key in ("peak", "after")))
        for option, way in _MEMORY.items()
        if way in rows
    ]
    return table(lines, ("way", "peak", "after the first result"))


def _start(content: Content) -> str:
    seconds = {(r["backend"], r["caches"]): r["seconds"]["total"] for r in content["rows"]}
    lines = [
        (option, *(f"{seconds[backend, caches]:.1f} s" for caches in both))
        for option, (backend, *both) in _STARTS.items()
        if all((backend, caches) in seconds for caches in both)
    ]
    return table(lines, ("way", "first start", "second start"))


_TABLES: dict[str, tuple[str, Callable[[Content], str]]] = {
    "quality": ("accuracy-draws", _quality),
    "decoding": ("models-cpu-gemma", _decoding),
    "head": ("models-cpu", _decoding),
    "rows": ("kernels-cpu", _rows),
    "memory": ("memory", _memory),
    "start": ("startup", _start),
}
