"""The README's table: each figure of tiny made-up results is counted here anew, losses included."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.core.results import Row
from bench.summary import summary
from tests.bench.made_up_results import cells

MIB = 2**20


def kernel(n: int, m: int, contender: str, us: float, threads: int = 1) -> Row:
    layer = {"shapes": "set", "n": n, "k": 100, "m": m, "threads": threads}
    return layer | {"contender": contender, "us": us}


def step(way: str, layers: int, ms: float, **more: Any) -> Row:
    row = {"model": "m", "layers": layers, "of_layers": 8, "phase": "decode", "batch": 4}
    return row | {"way": way, "ms": ms} | more


def quality(way: str, bits_per_weight: float, divergence: float, model: str = "gemma") -> Row:
    row = {"model": model, "way": way, "bits_per_weight": bits_per_weight}
    return row | {"divergence": divergence}


def start(backend: str, caches: str, total: float) -> Row:
    return {"backend": backend, "caches": caches, "seconds": {"total": total}}


ROWS: dict[str, list[Row]] = {
    "models-cpu": [
        step("inductor", 2, 1.0), step("inductor", 4, 10.0), step("int4", 4, 4.0),
        step("int4 head", 4, 20.0), step("torchao int4", 4, 2.0),
        step("inductor", 8, 20.0, extrapolated_from=[2, 4]),
    ],
    "models-cpu-gemma": [
        step("inductor", 8, 9.0), step("int4", 8, 3.0), step("llama.cpp", 8, 4.0),
    ],
    "kernels-cpu": [
        kernel(9, 1, "fqcompile bf16", 1.0), kernel(5, 16, "fqcompile bf16", 8000.0),
        kernel(5, 16, "F.linear bf16", 4000.0), kernel(5, 16, "rival", 2000.0),
        kernel(5, 16, "slow", 9000.0), kernel(5, 16, "fqcompile fp32", 1000.0),
        kernel(5, 16, "fqcompile bf16", 1.0, threads=2), kernel(3, 16, "rival", 1.0),
    ],
    "memory": [
        {"way": way, "peak": peak * MIB, "after": after * MIB}
        for way, peak, after in (("bf16", 9, 8), ("quantize_", 7, 3), ("load", 4, 2))
    ],
    "accuracy-draws": [
        quality("int4 uniform g64", 4.25, 0.4), quality("int8 g128", 8.125, 0.001),
        quality("int4 normal adaptive, synthetic", 4.25, 0.1),
        quality("int4 normal g32, synthetic", 4.5, 0.05),
        quality("a", 4.5, 0.3), quality("a", 4.5, 0.001, "MiniLM"), quality("b", 5.0, 0.2),
    ],
    "startup": [
        start(backend, caches, t)
        for backend, caches, times in (
            ("inductor", "cold", (5.0, 3.0, 4.0)), ("inductor", "warm", (1.0,)),
            ("finequant", "cold", (9.0,)), ("finequant", "warm", (2.0,)),
        )
        for t in times
    ],
}  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> str:
    for name, rows in ROWS.items():
        about = {"device": "A CPU", "torch": "2"}
        content = {"identity": about, "settings": {"layers": 3}, "rows": rows}
        path = tmp_path / "a-cpu" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return summary(tmp_path)


def test_a_device_is_named_once(table: str) -> None:
    assert table.startswith("A CPU, torch 2:\n\n| ")
    assert table.count("A CPU") == 1


def test_decoding_is_that_of_the_most_layers_that_ran(table: str) -> None:
    row = cells(table, "decode a token: 4 of 8 layers of m")
    assert row[1:] == ["Inductor 10.0 ms", "int4 4.0 ms (2.50x), int4 (head too) 20.0 ms (0.50x)",
                       "torchao int4 (head too) 2.0 ms"]  # fmt: skip


def test_a_whole_model_has_no_number_of_layers(table: str) -> None:
    row = cells(table, "decode a token: m, batch 4, bf16")
    assert row[1:] == ["Inductor 9.0 ms", "int4 3.0 ms (3.00x)", "llama.cpp 4.0 ms"]


def test_many_rows_show_the_fastest_library_and_our_loss(table: str) -> None:
    row = cells(table, "a layer of 5 x 100 with 16 rows, bf16, 1 thread ")
    assert row[1:] == ["4 ms", "int4 8 ms (0.50x)", "rival 2 ms (2.00x)"]


def test_memory_is_peak_and_rest(table: str) -> None:
    row = cells(table, "memory, peak / after the first result: 3 layers")
    assert row[1:] == ["9 / 8 MiB", "`quantize_` 7 / 3 MiB; `load` 4 / 2 MiB", ""]


def test_quality_is_the_default_what_it_began_from_and_every_library(table: str) -> None:
    row = cells(table, "divergence")
    ours = "int4 0.100 at 4.25 bits; uniform levels 0.400 at 4.25 bits"
    assert row[1:] == ["0", ours, "a 0.300 at 4.50 bits; b 0.200 at 5.00 bits"]


def test_starts_are_medians(table: str) -> None:
    assert cells(table, "process start")[1:3] == ["Inductor 4.0 s / 1.0 s", "9.0 s / 2.0 s"]


def test_without_results_there_is_no_table(tmp_path: Path) -> None:
    assert summary(tmp_path) == ""
