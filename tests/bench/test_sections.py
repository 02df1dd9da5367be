"""The sections of results: every figure of a tiny case is counted here anew, losses included."""

from typing import Any

from bench.core.results import Row
from bench.experts.section import expert_decode, expert_decode_short
from bench.kernels.section import cpu_kernels, cpu_kernels_short
from bench.launch_overhead.section import (
    launch_overhead,
    launch_overhead_short,
)
from bench.models.section import models, models_short
from bench.start.section import memory, startup
from bench.static.section import predictions, static, static_short, stream_k
from tests.bench.made_up_results import cells, content

MIB, GIB = 2**20, 2**30


def kernel(n: int, m: int, contender: str, us: float, **more: Any) -> Row:
    row = {"shapes": "set", "n": n, "k": 100, "m": m, "threads": 1, "bytes": 5000 * n}
    about = {"contender": contender, "detail": "1.2+cpu", "us": us, "low": us - 1, "high": us + 1}
    return row | about | more


def kernel_content() -> dict[str, Any]:
    rows = []
    for n in (10, 20):
        rows += [kernel(n, 1, "fqcompile bf16", 100.0 * n), kernel(n, 1, "rival", 150.0 * n)]
        rows += [kernel(n, 16, "fqcompile bf16", 900.0), kernel(n, 16, "rival", 80.0 * n)]
        rows += [kernel(n, 16, "other fp32", 1.0 * n)]
    rates = {"1": 1e8}
    return content(rows, bits=4, group=128, read_bandwidth=rates)


def test_kernels_on_a_cpu_show_who_is_faster_and_the_rate_of_reading() -> None:
    text = cpu_kernels(kernel_content())
    # 50000 bytes in 1000 us are 5e7 a second, half of 1e8
    row = cells(text, "10 x 100")
    assert row == ["10 x 100", "1", "1", "**1000 [999, 1001]**", "1500 [1499, 1501]", "", "50%"]
    assert "rival at M = 16 in 1 of 2 layers; other fp32 at M = 16 in 2 of 2 layers" in text
    assert "rival (1.2)" in text
    assert "0.1 GB/s on one thread" in text
    assert "Left out: x: no time." in text


def test_the_short_table_has_the_largest_layer_of_each_set_in_16_bits() -> None:
    text = cpu_kernels_short(kernel_content())
    assert "| 10 x 100" not in text
    assert cells(text, "20 x 100") == ["20 x 100", "1", "1", "**2000**", "3000", "50%"]
    assert "other fp32 at M = 16 in 2 of 2 layers" in text  # a loss all the same


def step(way: str, layers: int, ms: float, plain: float, **more: Any) -> Row:
    row = {"model": "m", "layers": layers, "of_layers": 8, "phase": "decode", "batch": 4}
    row |= {"tokens": 64, "way": way, "library": f"{way}lib 1.0+cpu", "ms": ms}
    row |= {"over_inductor": plain / ms, "ideal_ms": 2.0, "of_ideal": 2.0 / ms}
    return row | {"bytes_read": 3 * GIB, "low": ms - 1, "high": ms + 1} | more


def start(way: str, caches: str, seconds: float) -> Row:
    sizes = {"loaded": 4 * GIB, "peak": 5 * GIB, "after": GIB}
    about = {"model": "m", "layers": 4, "of_layers": 8, "way": way, "start": caches}
    return about | {"first_call_s": seconds} | sizes


def model_content() -> dict[str, Any]:
    rows = [step("inductor", 2, 5.0, 5.0), step("inductor", 4, 10.0, 10.0)]
    rows += [step("int4", 4, 4.0, 10.0), step("int8", 4, 20.0, 10.0)]
    rows += [step("int4", 8, 8.0, 20.0, extrapolated_from=[2, 4])]
    rows += [start("int4", "cold", 30.5), start("int4", "warm", 3.25)]
    return content(rows, dtype="bf16")


def test_models_have_a_line_for_each_work_with_ratio_and_share() -> None:
    text = models_short(model_content())
    expected = ["10.00 (20%)", "4.00 (2.50x, 50%)", "20.00 (0.50x, 10%)"]  # losses too
    assert cells(text, "m ")[:4] == ["m", "4 of 8", "decode 64", "4"]
    assert cells(text, "m ")[4:] == expected
    whole = cells(text, "m | 8, extrapolated")
    assert whole[4:] == ["", "8.00 (2.50x, 25%, 500 tokens/s)", ""]
    assert "int4 (int4lib 1.0)" in text
    assert "2 of 8 " not in text
    starts = [line for line in text.splitlines() if "30.5" in line]
    assert [c.strip() for c in starts[0].strip("|").split("|")] == [
        "m", "4 of 8", "int4", "30.5", "3.2", "4.00", "5.00", "1.00"
    ]  # fmt: skip


def test_all_rows_of_models_have_the_time_of_a_token_and_the_ideal() -> None:
    text = models(model_content())
    row = cells(text, "m | 2 of 8")
    assert row[:9] == [
        "m", "2 of 8", "decode 64", "4", "inductor", "5.00 [4.00, 6.00]", "1.25", "1.00x", "3.00"
    ]  # fmt: skip
    assert row[9:11] == ["2.00", "40%"]


def test_models_measured_before_there_was_an_ideal_are_shown_without() -> None:
    old = step("int4", 8, 4.0, 8.0)
    for key in ("ideal_ms", "of_ideal", "bytes_read", "library"):
        del old[key]
    for render in (models, models_short):
        assert "%" not in render(content([old], dtype="bf16"))


def test_memory_is_in_mib_and_over_the_plain_model() -> None:
    plain = {"way": "bf16", "loaded": 10 * MIB, "peak": 20 * MIB, "after": 12 * MIB}
    other = {"way": "torchao", "library": "torchao 9", "loaded": MIB, "peak": 30 * MIB}
    rows = [plain, other | {"after": 2 * MIB}, {"way": "load", "failure": "why"}]
    text = memory(content(rows, layers=3))
    assert cells(text, "torchao") == ["torchao (torchao 9)", "1", "30", "2", "1.50"]
    assert "No figure: load: why." in text
    assert "3 layers" in text


def test_starts_are_medians_of_their_rounds() -> None:
    parts = ("total", "import", "first call", "quantize", "x86 build", "compile")
    rows = [
        {"backend": "b", "caches": "cold", "seconds": {part: t + n for n, part in enumerate(parts)}}
        for t in (1.0, 5.0, 2.0)
    ]
    text = startup(content(rows, rounds=3))
    assert cells(text, "b, cold") == ["b, cold", "2.0", "3.0", "4.0", "5.0", "6.0", "7.0"]
    assert "medians of 3 rounds" in text


def test_a_layer_of_experts_is_compared_in_its_own_form() -> None:
    rows = []
    for dtype, factor in (("bf16", 4.0), ("fp32", 0.5)):
        about = {"tokens": 1, "dtype": dtype, "form": "f", "memory": 1.25, "packed_mib": 100.0}
        spread = {"low": 1.0, "high": 9.0}
        rows += [about | spread | {"ours": False, "ms": 2 * factor}]
        rows += [about | spread | {"ours": True, "ms": 2.0}]
    settings = {"num_experts": 4, "hidden_size": 8, "moe_intermediate_size": 6, "top_k": 2}
    whole = content(rows, threads=2, **settings)
    text = expert_decode(whole)
    assert cells(text, "1 | bf16")[3:] == ["8.00 [1.00, 9.00]", "2.00 [1.00, 9.00]", "4.0x"]
    assert cells(text, "1 | fp32")[5] == "0.5x"
    assert "at most 1.25 times the packed size (100 MiB)" in text
    assert "fp32" not in expert_decode_short(whole)


def test_the_operator_is_held_against_the_launcher() -> None:
    rows = [{"way": "l", "us": 12.0, "best": 10.0}, {"way": "o", "us": 30.0, "best": 21.5}]
    found = content(rows, launcher="l", operator="o", stub=True)
    assert "11.5 us more" in launch_overhead_short(found)
    assert "a stub stands for the GPU" in launch_overhead_short(found)
    assert cells(launch_overhead(found), "o |")[1:] == ["30.0", "21.5"]


def test_of_machine_code_the_tile_with_the_fewest_instructions_is_shown() -> None:
    rest = {"kb_in_flight": 72.0, "issue": 7.25, "memory": 4.3}
    names = {
        "gemm w4 g128 bf16 16x64x128x1w4s4 sm_90": 2.5,
        "gemm w4 g128 bf16 16x128x128x1w4s4 sm_90": 2.25,
        "gemm w4 g128 bf16 16x128x128x8w4s4 sm_90": 1.0,  # splits K
        "gemm w8 g128 bf16 16x128x128x1w4s4 sm_90": 1.0,
        "plain w4 g128 bf16 16x128x128x1w4s4 sm_90": 8.125,
    }
    rows = [{"kernel": k, "instructions_per_weight": v} | rest for k, v in names.items()]
    text = static_short(content(rows))
    assert cells(text, "gemm") == ["gemm w4 g128 bf16 sm_90", "2.25", "72", "7.25", "4.3"]
    assert cells(text, "plain")[1] == "8.12"
    assert text.count("sm_90") == 2
    assert static(content(rows)).count("sm_90") == 5


def test_predictions_stand_beside_each_other_and_beside_what_others_published() -> None:
    row = {"layer": "10 x 10 w4", "gpu": "G", "m": 1, "config": "tile", "ideal": 1.0, "model": 2.0}
    near = row | {"simulated": 2.2, "sixteen_bits": 4.0, "published": ["A 3 µs (there)"]}
    far = near | {"m": 2, "simulated": 3.0, "published": []}
    dense = {key: near[key] for key in near if key != "simulated"} | {"m": 3, "gpu": "H"}
    text = predictions(content([near, far, dense]))
    assert "1.10 to 1.50 of the model's, 1 of 2 further than 25 %" in text
    first = ["10 x 10 w4", "1", "tile", "1.0", "2.0", "2.2", "4.0", "A 3 µs (there)"]
    assert cells(text, "10 x 10 w4") == first
    assert "H:" in text and "| 10 x 10 w4 | 3   | tile            | 1.0" in text


def test_stream_k_is_counted_where_it_gains_a_tenth() -> None:
    row = {"layer": "l", "gpu": "G", "m": 64, "config": "c", "model": 10.0, "stream_config": "s"}
    rows = [row | {"stream": 10 - 10 * gain, "gain": gain} for gain in (0.1, 0.09, -0.2)]
    text = stream_k(content([*rows, rows[0] | {"simulated_gain": 0.05}]))
    assert "G, gain: 10 % and more in 2 of 4 cases." in text
    assert "G, simulated_gain: 10 % and more in 0 of 1 cases." in text
