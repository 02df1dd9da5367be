"""`bench tune`: its numbers worked out again on tiny cases, nothing wrong timed, a GPU made up."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.core import measure
from bench.core.measure import Replay, recorded_on_cpu
from bench.tune import cases as tune_cases
from bench.tune import run as tune
from fqcompile.errors import OptionError
from fqcompile.kernels.cpu.aten_packed import INT4PACK, INT8PACK
from fqcompile.kernels.dequantize import DEQUANTIZE
from fqcompile.kernels.registry import KernelChoice, select_kernel
from fqcompile.kernels.roofline import read_bandwidth
from fqcompile.kernels.spec import H200, GemmSpec
from fqcompile.kernels.template import Template
from fqcompile.kernels.tuning import measure as measure_module
from fqcompile.kernels.tuning.search import WrongResult
from fqcompile.report.tuning_report import TuningReport
from tests.kernels.tuning.fake import CLOSED, FAST, TEMPLATE, FakeMeasure, time_of
from tests.report.page_parser import Page

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "ROTATED_BYTES", 1 << 16)


def clock(times: Sequence[float]) -> Callable[[Sequence[Callable[[], object]]], Replay]:
    """Runs what it is to time once; what comes first takes times[0] µs, and so on."""
    left = list(times)

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        assert len(calls) >= 2, "there is more than one copy of the weight"
        for call in calls:
            call()
        time = left.pop(0)
        # Of 25 five each are faster and slower by half, so 0.9 and 1.1 of it are the percentiles.
        return lambda warm_ups, replays: [time, time, time, 0.5 * time, 1.5 * time][:replays]

    return record


def spec(m: int, **changes: Any) -> GemmSpec:
    return replace(GemmSpec(m, 128, 256, 4, 64, BF16, BF16, "cpu"), **changes)


def run(record: Any, *more: str) -> TuningReport:
    arguments = tune.parse(["--device", "cpu", "--shapes", "128x256", "--group", "64", *more])
    return tune.run(arguments, CPU, None, record)


def test_a_cpu_case_has_every_kernel_and_its_numbers_follow_from_the_times() -> None:
    templates = [INT8PACK, INT4PACK, DEQUANTIZE]
    case = tune_cases.compared_on_cpu(spec(3), clock([30.0, 20.0]), templates)
    assert [c.name for c in case.candidates] == ["aten_int8pack", "aten_int4pack", "dequantize"]
    assert [c.refusal for c in case.refused] == ["takes one scale per column, not groups of 64"]
    # Codes, a bf16 scale for each group of 64, x and y in bf16.
    moved = 128 * 256 / 2 + 128 * 4 * 2 + 3 * 2 * (256 + 128)
    ideal = 1e6 * moved / read_bandwidth()
    assert case.ideal_us == pytest.approx(ideal)
    int4pack, dequantize = case.as_dict()["trials"][1:]  # type: ignore[index]
    for trial, us in ((int4pack, 30.0), (dequantize, 20.0)):
        assert trial["microseconds"] == us
        assert (trial["low"], trial["high"]) == pytest.approx((0.9 * us, 1.1 * us))
        assert trial["spread"] == pytest.approx(0.2)
        assert trial["of_ideal"] == pytest.approx(ideal / us)
    assert case.best == "dequantize"
    assert case.choice == select_kernel(spec(3)).template.name


def test_the_spread_reaches_over_the_middle_three_fifths() -> None:
    case = tune_cases.compared_on_cpu(spec(1), recorded_times(range(1, 26)), [DEQUANTIZE])
    timing = case.timed["dequantize"]
    assert (timing.microseconds, timing.low, timing.high) == (13.0, 5.8, 20.2)
    assert timing.spread == pytest.approx((20.2 - 5.8) / 13.0)


def recorded_times(times: Sequence[float]) -> Callable[[Sequence[Callable[[], object]]], Replay]:
    left = [float(time) for time in times]
    return lambda calls: lambda warm_ups, replays: [left.pop() for _ in range(replays)]


def broken(name: str, run: Any) -> Template:
    return replace(DEQUANTIZE, name=name, run=run)


def test_what_is_wrong_or_fails_is_refused_and_not_timed() -> None:
    def twice(*arguments: Any) -> torch.Tensor:
        return 2 * DEQUANTIZE.run(*arguments)

    def failing(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("no\nmore")

    templates = [broken("twice", twice), broken("failing", failing), DEQUANTIZE]
    # A second recording would find no time.
    case = tune_cases.compared_on_cpu(spec(2), clock([9.0]), templates)
    assert list(case.timed) == ["dequantize"]
    wrong, failed = (c.refusal or "" for c in case.refused)
    assert wrong.startswith("wrong result: relative error 1, allowed")
    assert failed == "RuntimeError: no"


def test_experts_are_compared_too() -> None:
    experts = spec(8, experts=4, routing="gathered")
    case = tune_cases.compared_on_cpu(experts, clock([9.0]), [DEQUANTIZE])
    assert list(case.timed) == ["dequantize"]
    assert case.layer == "4x128x256 int4 g64 bfloat16 gathered"


def test_calls_go_round_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []

    def call(i: int) -> Callable[[], None]:
        def run() -> None:
            seen.append(i)
            now[0] += i * 1e-6

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    replay = recorded_on_cpu([call(1), call(2), call(3)])
    assert replay(2, 2) == pytest.approx([3.0, 1.0])
    assert replay(1, 3) == pytest.approx([3.0, 1.0, 2.0])
    assert seen == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_run_on_a_cpu_writes_its_files_and_says_what_there_is_to_tune(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "tune.json"), "--html", str(tmp_path / "tune.html")]
    shape = ["--device", "cpu", "--shapes", "128x256", "--group", "64"]
    tune.main([*shape, "--m", "1,3", "--threads", "1", *files])
    printed = capsys.readouterr().out
    assert "No kernel for CPUs has a configuration to search" in printed
    assert "all cases: aten_int8pack refused: takes one scale per column" in printed
    content = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert {"device", "torch", "commit", "command"} <= set(content["identity"])
    assert (content["settings"]["threads"], content["settings"]["bits"]) == (1, 4)
    assert [row["rows"] for row in content["rows"]] == [1, 3]
    page = Page((tmp_path / "tune.html").read_text(encoding="utf-8"))
    assert [row[2] for row in page.rows["best-of-each-case"]] == ["M = 1", "M = 3"]
    for case, row in zip(content["rows"], page.rows["best-of-each-case"], strict=True):
        timed = {t["config"]: t["microseconds"] for t in case["trials"] if "refusal" not in t}
        fastest = min(timed, key=lambda name: timed[name])
        assert (case["best"], row[3]) == (fastest, fastest)
        assert float(row[4].replace(",", "")) == pytest.approx(timed[fastest], abs=0.05)
        share = case["ideal_us"] / timed[fastest]
        assert row[6] == f"{share:.0%}"
        over = timed[case["choice"]] / timed[fastest]
        assert row[9] == f"{over:.2f}x"
        assert f"{over:.2f}x" in printed


def test_what_the_time_did_not_allow_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(clock([]), "--m", "1,3", "--time-budget", "0")
    assert not report.cases
    assert report.left_out == ["128x256 M=1", "128x256 M=3"]
    tune.show(report)
    assert "left out: 128x256 M=3" in capsys.readouterr().out


def test_stopped_by_hand_it_shows_what_it_has() -> None:
    measured = clock([1.0, 2.0, 3.0])

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        try:
            return measured(calls)
        except IndexError:
            raise KeyboardInterrupt from None

    report = run(record, "--m", "1,3")
    assert [case.rows for case in report.cases] == ["M = 1"]
    assert report.left_out == ["128x256 M=3 and all after it: stopped"]


def test_sets_of_shapes_are_their_layers_and_buckets_of_a_gpu_are_tuned_once() -> None:
    arguments = tune.parse(["--shapes", "llama-3-8b", "4x64x128", "--m", "1,9,16"])
    found = tune.asked_for(arguments, None)
    assert len(found) == (4 + 2) * 3
    assert {s.device_type for s in found} == {"cpu"}
    on_gpu = tune.asked_for(arguments, H200)
    assert len(on_gpu) == (4 + 2) * 2
    assert {(s.m, s.device_type, s.gpu) for s in on_gpu} == {(1, "cuda", H200), (16, "cuda", H200)}


@pytest.mark.parametrize("name", ["llama", "4096", "0x8"])
def test_a_shape_that_is_none_is_told(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        tune.asked_for(tune.parse(["--shapes", name]), None)
    with pytest.raises(SystemExit, match="bench tune: shape"):
        tune.main(["--device", "cpu", "--shapes", name])


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_a_number_of_threads_that_is_none_is_told(
    threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.parse(["--threads", threads])
    assert "is no number of threads" in capsys.readouterr().err


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeMeasure:
    """An H200 that is not there, with one kernel, in both modules."""
    for module in (tune, tune_cases):
        monkeypatch.setattr(module, "select_kernel", lambda spec: KernelChoice(TEMPLATE))
    return FakeMeasure()


def run_on_gpu(measure: FakeMeasure, record: Any, *more: str) -> TuningReport:
    options = ["--shapes", "128x256", "--group", "64", "--m", "16", *more]
    return tune.run(tune.parse(options), CPU, H200, record, measure)


def test_a_gpu_case_is_searched_then_best_and_closed_form_measured_in_turn(
    made_up_gpu: FakeMeasure,
) -> None:
    (case,) = run_on_gpu(made_up_gpu, clock([40.0, 44.0])).cases
    assert made_up_gpu.tried == list(FAST)
    assert case.timed == {str(c): case.timed[str(c)] for c in FAST}
    assert case.timed[str(FAST[-1])].microseconds == time_of(FAST[-1])
    assert (case.best, case.choice) == (str(FAST[-1]), str(CLOSED.at(16)))
    assert {n: t.microseconds for n, t in case.final.items()} == {
        case.best: 40.0,
        case.choice: 44.0,
    }
    assert case.choice_over_best == pytest.approx(44 / 40)
    assert case.rows == "M <= 16"
    # Codes, scales, x and y once at 4.3 TB/s.
    moved = 128 * 256 / 2 + 128 * 4 * 2 + 16 * 2 * (256 + 128)
    assert case.ideal_us == pytest.approx(1e6 * moved / 4.3e12)


def test_each_run_begins_with_an_empty_table(made_up_gpu: FakeMeasure) -> None:
    for _ in range(2):
        run_on_gpu(made_up_gpu, clock([40.0, 44.0]))
    assert made_up_gpu.tried == [*FAST, *FAST]


def test_where_the_closed_form_is_the_best_nothing_is_measured_twice(
    made_up_gpu: FakeMeasure,
) -> None:
    made_up_gpu.faults.update((c, WrongResult("far off")) for c in FAST[1:])
    (case,) = run_on_gpu(made_up_gpu, clock([])).cases
    assert (case.verdict, case.final, len(case.refused)) == ("best", {}, 11)


def test_a_second_measurement_that_fails_leaves_the_first(made_up_gpu: FakeMeasure) -> None:
    def record(calls: object) -> Replay:
        raise RuntimeError("out of memory")

    (case,) = run_on_gpu(made_up_gpu, record).cases
    assert case.problem == "not measured a second time: RuntimeError: out of memory"
    assert case.choice_over_best == pytest.approx(50.0 / time_of(FAST[-1]))


def test_a_kernel_without_configurations_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "select_kernel", lambda spec: KernelChoice(DEQUANTIZE))
    report = run_on_gpu(FakeMeasure(), clock([]))
    assert report.left_out == [
        "128x256 M=16: OptionError: kernel dequantize has no configuration to search"
    ]
