"""`bench kernels` with made-up kernels and a made-up clock: all of it but CUDA's own part."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.core import measure
from bench.core.measure import REPLAYS, ROUNDS, Replay, timings
from bench.core.shapes import SHAPES, parse_shapes
from bench.kernels import contenders
from bench.kernels import run as kernels
from bench.kernels.baselines import BASELINES
from bench.kernels.contenders import Contender, wrong_result
from bench.kernels.section import gpu_kernels
from fqcompile.errors import OptionError
from fqcompile.kernels.registry import KernelChoice
from fqcompile.kernels.roofline import ideal_seconds
from fqcompile.kernels.spec import DENSE, H200, LaunchTable, TileConfig
from fqcompile.kernels.tuning import measure as measure_module
from fqcompile.kernels.tuning.launches import SEARCHED, Chosen
from fqcompile.kernels.tuning.measure import DeviceLost
from tests.bench.made_up_results import cells
from tests.kernels.tuning.fake import CLOSED, TEMPLATE

CPU = torch.device("cpu")
ARGUMENTS = ["--shapes", "64x256", "--m", "1,16", "--group", "64", "--baselines"]


def clock(microseconds: float = 10.0) -> Callable[[Sequence[Callable[[], object]]], Replay]:
    """Runs what it is to time once; each that comes later is said to take a tenth longer."""
    seen: list[int] = []

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        results = [call() for call in calls]
        assert len(results) >= 2
        seen.append(len(results))
        time = microseconds * (1 + (len(seen) - 1) / 10)
        return lambda warm_ups, replays: [time] * replays

    return record


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of `fake`, and caches that hold little."""
    monkeypatch.setattr(contenders, "select_kernel", lambda spec: KernelChoice(TEMPLATE))
    monkeypatch.setattr(measure_module, "ROTATED_BYTES", 1 << 16)


def run(*more: str, record: Any = None) -> kernels.Results:
    arguments = kernels.parse([*ARGUMENTS, *more])
    return kernels.run(arguments, CPU, H200, record or clock())


def named(results: kernels.Results, m: int = 1) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in results.rows if row["m"] == m}


def test_a_set_has_the_four_matrices_of_a_layer_and_other_shapes_are_n_by_k() -> None:
    assert [str(s) for s in parse_shapes(["llama-3-8b"])] == [
        "6144x4096", "4096x4096", "28672x4096", "4096x14336"
    ]  # fmt: skip
    assert parse_shapes(["7x9", "squares", "4096x4096"])[0] == ("given", 7, 9)
    assert len(parse_shapes(["llama-3-8b", "squares"])) == 6
    assert all(len(shapes) >= 3 for shapes in SHAPES.values())


@pytest.mark.parametrize("name", ["llama", "4096", "0x8", "8x0", "x"])
def test_a_shape_that_is_none_is_told(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        parse_shapes([name])


def test_a_row_has_its_time_its_ideal_and_its_ratio_to_cublas() -> None:
    results = run("cuBLAS")
    assert [row["m"] for row in results.rows] == [1, 1, 1, 16, 16, 16]
    rows = named(results, 16)
    assert list(rows) == ["fqcompile closed form", "fqcompile dense", "cuBLAS"]
    ours = rows["fqcompile closed form"]
    spec = replace(kernels.specs(*_layer())[0], m=16)
    assert ours["ideal_us"] == pytest.approx(1e6 * ideal_seconds(spec, 16))
    assert ours["detail"] == f"fake:{CLOSED.at(16)}"
    assert ours["of_ideal"] == ours["ideal_us"] / ours["us"]
    assert ours["over_cublas"] == pytest.approx(rows["cuBLAS"]["us"] / ours["us"])
    assert rows["cuBLAS"]["detail"] == f"torch {version('torch')}"
    assert {ours[k] for k in ("n", "k", "bits", "group", "dtype")} == {64, 256, 4, "bfloat16"}


def _layer() -> tuple[Any, ...]:
    return parse_shapes(["64x256"])[0], kernels.parse([*ARGUMENTS]), H200, "cpu"


def test_a_group_as_long_as_k_is_a_column() -> None:
    for group in ("column", "256", "1000"):
        assert named(run("--group", group))["fqcompile dense"]["group"] == "column"


def test_compiled_by_torch_it_is_the_same_layer() -> None:
    torch.compiler.reset()
    rows = named(run("cuBLAS", "torch.compile"))
    assert "us" in rows["torch.compile"], rows["torch.compile"]


def test_what_is_not_there_is_in_the_table() -> None:
    results = run("gemlite", "tinygemm", "torchao", "cuBLAS", "--bits", "8")
    lines = {f"{r['contender']}: {r['failure']}" for r in results.rows if "failure" in r}
    assert "tinygemm: takes int4 and bf16" in lines
    for name in ("torchao", "gemlite"):
        if BASELINES[name].absent(kernels.specs(*_layer())[0]) == f"{name} is not installed":
            assert f"{name}: {name} is not installed" in lines


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*arguments: Any) -> torch.Tensor:
        factor = 1 if arguments[-1] is DENSE else 2
        return factor * TEMPLATE.run(*arguments)

    wrong = KernelChoice(replace(TEMPLATE, run=twice))
    monkeypatch.setattr(contenders, "select_kernel", lambda spec: wrong)
    rows = named(run("cuBLAS"))
    assert rows["fqcompile closed form"]["failure"].startswith("wrong result: relative error 1,")
    assert "us" not in rows["fqcompile closed form"]
    assert "us" in rows["fqcompile dense"]


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("out of resource\nmore")

    failing = KernelChoice(replace(TEMPLATE, run=broken))
    monkeypatch.setattr(contenders, "select_kernel", lambda spec: failing)
    results = run("cuBLAS")
    assert named(results)["fqcompile dense"]["failure"] == "RuntimeError: out of resource"
    assert "us" in named(results)["cuBLAS"]
    kernels.show(results, gpu_kernels)


@pytest.mark.parametrize("last", [False, True])
def test_split_k_is_timed_with_both_ways_to_finish(
    last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = TileConfig(16, 64, 128, 2, last_finishes=last)
    template = replace(TEMPLATE, launches=lambda spec: LaunchTable.of(split))
    monkeypatch.setattr(contenders, "select_kernel", lambda spec: KernelChoice(template))
    rows = named(run())
    assert rows["fqcompile closed form"]["detail"] == f"fake:{split}"
    other = replace(split, last_finishes=not last)
    assert rows["fqcompile other finish"]["detail"] == f"fake:{other}"


def test_what_tuning_found_is_timed_beside_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def tuned(spec: Any, template: Any, mode: Any) -> Chosen:
        asked.append((spec.m, mode))
        return Chosen(LaunchTable.of(CLOSED.at(128)), SEARCHED)

    monkeypatch.setattr(contenders, "tuned_launches", tuned)
    rows = named(run("--tune", "fast"))
    assert rows["fqcompile tuned"]["detail"] == f"fake:{CLOSED.at(128)}"
    assert asked == [(1, "fast"), (16, "fast")]


def test_the_file_is_whole_after_every_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels.json"
    steps: list[int] = []

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        if path.exists():
            steps.append(len(json.loads(path.read_text())["rows"]))
        return clock()(calls)

    run("cuBLAS", "--json", str(path), record=record)
    assert steps == [0, 0, 0, 3, 3, 3]  # of the steps before, in each of the three calls
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 6
    assert content["settings"]["m"] == [1, 16]
    assert {"device", "commit", "command", "torch"} <= set(content["identity"])
    assert not content["left_out"]


def test_what_there_was_no_time_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    results = run("--time-budget", "0")
    assert not results.rows
    assert results.left_out == ["64x256 M=1", "64x256 M=16"]
    kernels.show(results, gpu_kernels)
    assert "Left out: 64x256 M=1, 64x256 M=16." in capsys.readouterr().out


def test_a_lost_gpu_ends_the_run_and_keeps_what_there_was() -> None:
    steps: list[int] = []

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        steps.append(1)
        if len(steps) > 2:
            raise DeviceLost("an illegal memory access")
        return clock()(calls)

    results = run("--shapes", "64x256", "32x256", record=record)
    assert [row["m"] for row in results.rows] == [1, 1]
    assert results.left_out == ["64x256 M=16 and all after it: an illegal memory access"]


def test_a_failure_while_timing_costs_that_step_alone() -> None:
    steps: list[int] = []

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        steps.append(1)
        return lambda warm_ups, replays: [0.0 if len(steps) < 4 else 1.0] * replays

    results = run("cuBLAS", record=record)
    assert results.left_out[0].startswith("64x256 M=1: ValueError")
    assert [row["m"] for row in results.rows] == [16] * 3


def test_the_table_shows_the_best_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.show(run("cuBLAS", "gemlite"), gpu_kernels)
    printed = capsys.readouterr().out
    # cuBLAS comes third, so it is said to take 12 us, ours 10
    assert cells(printed, "64 x 256 | 1 ")[-2:] == ["1.20x", str(CLOSED.at(1))]
    assert "No figure: gemlite: " in printed


def test_alternatives_are_timed_in_turn() -> None:
    order: list[str] = []

    def replay(name: str) -> Replay:
        def times(warm_ups: int, replays: int) -> list[float]:
            order.append(name)
            return [float(len(order))] * replays

        return times

    found = timings({name: replay(name) for name in "ab"})
    assert order == ["a", "b"] * ROUNDS
    assert found["a"].microseconds == 5.0
    assert found["b"].microseconds == 6.0
    assert ROUNDS * REPLAYS >= 20


def test_a_graph_is_made_once_all_is_compiled_and_its_time_is_that_of_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def captured(rotate: Callable[[], object], rounds: int) -> str:
        order.append(f"{rounds} rounds")
        rotate()
        return "graph"

    def replayed(graph: str, warm_ups: int, replays: int) -> list[float]:
        assert (graph, warm_ups) == ("graph", 2)
        return [160.0] * replays

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "replayed", replayed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    calls = [partial(order.append, str(copy)) for copy in range(4)]
    replay = measure.recorded_on_gpu(calls)
    once = ["0", "1", "2", "3"]
    assert order == [*once, "wait", "4 rounds", *once]
    assert replay(2, 3) == [10.0] * 3


def test_a_shape_too_large_is_left_out_and_the_next_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def problem(spec: Any, device: torch.device) -> contenders.Problem:
        if spec.n == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return contenders.Problem(spec, device)

    monkeypatch.setattr(kernels, "Problem", problem)
    results = run("--shapes", "32x256", "64x256")
    why = "OutOfMemoryError: CUDA out of memory"
    assert results.left_out == [f"32x256 M=1: {why}", f"32x256 M=16: {why}"]
    assert {row["n"] for row in results.rows} == {64}


def test_who_quantizes_anew_may_be_a_step_away_and_no_more() -> None:
    spec = replace(kernels.specs(*_layer())[0], n=64, m=8)
    problem = contenders.Problem(spec, CPU)
    expected = problem.expected(8)
    own = Contender("own", "", torch.nn.functional.linear, [], quantizes=True)
    noise = torch.randn(expected.shape, dtype=torch.float64)
    noise *= expected.norm() / noise.norm()
    assert wrong_result(expected + 0.1 * noise, expected, own, spec) is None
    assert "allowed 0.12" in str(wrong_result(expected + 0.2 * noise, expected, own, spec))
    assert wrong_result(expected * torch.nan, expected, own, spec) is not None
    exact = replace(own, quantizes=False)
    assert "relative error" in str(
        wrong_result((expected + 0.1 * noise).bfloat16(), expected, exact, spec)
    )
