"""`fqcompile tune`: its table and report with a made-up kernel, and its words without a GPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fqcompile.cli import main
from fqcompile.commands import tune
from fqcompile.kernels.registry import KernelChoice
from fqcompile.kernels.spec import H200, TileConfig
from fqcompile.kernels.template import DEQUANTIZE
from fqcompile.kernels.tuning.measure import DeviceLost, WrongResult
from tests.kernels.tuning.fake import CLOSED, FAST, TEMPLATE, FakeMeasure, time_of
from tests.report.page_parser import Page

BEST = FAST[-1]


def two_layers() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model of two distinct matmuls, one of them met twice."""
    layers = (nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 512))
    return nn.Sequential(*layers), (torch.randn(2, 256),)


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMeasure]:
    """An H200 that is not there, with one kernel."""
    fake = FakeMeasure()
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "gpu_of", lambda device: H200)
    monkeypatch.setattr(tune, "select_kernel", lambda spec: KernelChoice(TEMPLATE))
    monkeypatch.setattr(tune, "measure_on_gpu", fake)
    monkeypatch.setattr(tune, "_DEVICE", torch.device("cpu"))
    yield fake


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "4096x14336"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "fqcompile tune: device cuda: torch sees no GPU on this machine\n"
    assert not printed.out


def test_it_prints_the_best_against_ideal_and_closed_form(
    measure: FakeMeasure, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "4096x14336", "--m", "16"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    row = next(line for line in printed.out.splitlines() if line.startswith("4096x14336"))
    best, closed = time_of(BEST), time_of(CLOSED.at(16))
    for text in (
        "normal4 g128 bfloat16",
        "M <= 16",
        str(BEST),
        f"{best:.1f} [{best - 1:.1f}, {best + 1:.1f}]",
        "%",
        str(CLOSED.at(16)),
        f"{closed / best:.2f}x",
        "12",
    ):
        assert text in row
    assert "kept in " in printed.out


def test_the_second_time_nothing_is_measured(
    measure: FakeMeasure, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for _ in range(2):
        assert main(["tune", "4096x14336"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert measure.set_up == [1, 16, 17, 128, 2048]
    for rows in ("M <= 1 ", "M <= 16 ", "M = 17 ", "M <= 128 ", "M > 512 "):
        assert outputs[0].count(rows) == 1


def test_ctrl_c_is_one_line_and_the_command_goes_on_from_there(
    measure: FakeMeasure, capsys: pytest.CaptureFixture[str]
) -> None:
    measure.faults[FAST[4]] = KeyboardInterrupt()
    assert main(["tune", "4096x14336", "--m", "16"]) == 2
    assert "stopped; what was measured is kept in" in capsys.readouterr().err
    measure.faults.clear()
    measure.tried.clear()
    assert main(["tune", "4096x14336", "--m", "16"]) == 0
    assert measure.tried == list(FAST[4:])


def test_a_lost_gpu_ends_the_command_which_goes_on_behind_what_lost_it(
    measure: FakeMeasure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    measure.faults[FAST[4]] = DeviceLost("illegal memory access")
    assert main(["tune", "4096x14336", "--m", "16,64"]) == 2
    told = capsys.readouterr().err
    assert f"stopped after {FAST[4]}: " in told and "the same command goes on" in told
    assert measure.set_up == [16]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    measure.tried.clear()
    assert main(["tune", "4096x14336", "--m", "16"]) == 0
    assert measure.tried == list(FAST[5:])


def _report(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "report" / "tuned.json"
    assert main(["tune", *arguments, "--report", str(path)]) == 0
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_the_report_has_every_trial(
    measure: FakeMeasure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure.faults[BEST] = WrongResult("relative error 0.3, allowed 0.0081")
    report = _report(tmp_path, "4096x14336", "--m", "12,16,600")
    assert report["fingerprint"]["gpu"] == "NVIDIA H200"
    assert report["mode"] == "fast"
    assert [(case["bucket"], case["rows"]) for case in report["cases"]] == [(16, 16), (None, 2048)]
    case = report["cases"][0]
    assert [trial["config"] for trial in case["trials"]] == [str(config) for config in FAST]
    assert case["best"] == str(FAST[-2])
    assert case["choice"] == str(CLOSED.at(16))
    assert case["choice_over_best"] == pytest.approx(50.0 / time_of(FAST[-2]))
    assert report["choice"] == "heuristic"
    assert case["trials"][0] == {
        "config": str(CLOSED.at(16)),
        "microseconds": 50.0,
        "low": 49.0,
        "high": 51.0,
        "spread": pytest.approx(2 / 50),
        "of_ideal": pytest.approx(case["ideal_us"] / 50.0),
    }
    reason = "wrong result: relative error 0.3, allowed 0.0081"
    assert case["trials"][-1] == {"config": str(BEST), "refusal": reason}
    # 4096 x 14336 int4 weights at the H200's 4.3 TB/s, and a little for the rest.
    assert 4096 * 14336 / 2 / 4.3e6 < case["ideal_us"] < 9
    printed = capsys.readouterr().out
    assert f"all cases: {BEST} refused: {reason}" in printed
    assert "12, 1 refused" in printed


def test_a_page_and_json_come_of_one_run(measure: FakeMeasure, tmp_path: Path) -> None:
    files = tmp_path / "tuned.html", tmp_path / "tuned.json"
    options = [word for file in files for word in ("--report", str(file))]
    assert main(["tune", "4096x14336", "--m", "16", *options]) == 0
    page = Page(files[0].read_text(encoding="utf-8"))
    (case,) = json.loads(files[1].read_text(encoding="utf-8"))["cases"]
    (row,) = page.rows["best-of-each-case"]
    best, closed = time_of(BEST), time_of(CLOSED.at(16))
    shown = "4096x14336 normal4 g128 bfloat16"
    assert row[:5] == ["1.", shown, "M <= 16", str(BEST), f"{best:.1f}"]
    assert row[6] == f"{case['ideal_us'] / best:.0%}"
    verdict = "within the spread"  # 50 [49, 51] and 48 [47, 49] µs
    assert row[7:11] == [str(CLOSED.at(16)), f"{closed:.1f}", f"{closed / best:.2f}x", verdict]
    assert [row[3] for row in page.rows["candidates"]] == [str(config) for config in FAST]
    assert ["gpu", "NVIDIA H200"] in page.rows["how-it-was-measured"]


def test_where_all_fail_the_case_says_so(
    measure: FakeMeasure, capsys: pytest.CaptureFixture[str]
) -> None:
    measure.faults.update((config, RuntimeError("no shared memory")) for config in FAST)
    for _ in range(2):
        assert main(["tune", "4096x14336", "--m", "16"]) == 0
        printed = capsys.readouterr().out
        assert "M <= 16: all 12 configurations failed" in printed
        assert "12, 12 refused" in printed


def test_a_models_matmuls_are_tuned_once_each(measure: FakeMeasure, tmp_path: Path) -> None:
    flags = ["--bits", "8", "--group", "64", "--m", "1"]
    report = _report(tmp_path, f"{__name__}:two_layers", "256x256", *flags)
    assert all(case["bits"] == 8 and case["group_size"] == 64 for case in report["cases"])
    shapes = [(case["n"], case["k"], case["dtype"]) for case in report["cases"]]
    # The model is fp32; the shape beside it is of the default dtype.
    fp32 = [(256, 256, "float32"), (512, 256, "float32")]
    assert sorted(shapes) == sorted([*fp32, (256, 256, "bfloat16")])


def test_gated_and_per_column_shapes_have_keys_of_their_own(
    measure: FakeMeasure, tmp_path: Path
) -> None:
    flags = ["4096x14336", "--m", "1"]
    reports = [
        _report(tmp_path, *flags, *more)["cases"][0]
        for more in ([], ["--gated"], ["--group", "column"], ["--dtype", "fp16"], ["--bits", "8"])
    ]
    assert len({case["key"] for case in reports}) == len(reports)
    assert [case["group_size"] for case in reports] == [128, 128, 14336, 128, 128]
    assert len(measure.set_up) == len(reports)


def test_a_stack_of_experts_is_tuned_for_both_routings(
    measure: FakeMeasure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(tmp_path, "128x768x2048", "--gated", "--m", "8,4096")
    found = [(c["experts"], c["routing"], c["n"], c["k"], c["rows"]) for c in report["cases"]]
    assert found == [
        (128, "grouped", 768, 2048, 8), (128, "grouped", 768, 2048, 8192),
        (128, "gathered", 768, 2048, 8), (128, "gathered", 768, 2048, 2048),
    ]  # fmt: skip
    assert "128x768x2048 normal4 g128 bfloat16 gated grouped" in capsys.readouterr().out
    (one,) = _report(tmp_path, "8x64x256", "--routing", "gathered", "--m", "1")["cases"]
    assert one["key"].startswith("experts=8 gathered ")


def test_a_kernel_without_configurations_is_named(
    measure: FakeMeasure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "select_kernel", lambda spec: KernelChoice(DEQUANTIZE))
    assert main(["tune", "4096x100"]) == 0
    printed = capsys.readouterr().out
    assert "4096x100 normal4 g100: kernel dequantize has no configuration to search" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0x4096"], "shape '0x4096' has an empty side"),
        (["0x4096x4096"], "shape '0x4096x4096' has an empty side; E, N and K"),
        (["4096x"], "neither a directory with a checkpoint nor"),
        (["4096x4096", "--m", "1,,2"], "'1,,2' is not a list of numbers"),
        (["4096x4096", "--m", "0"], "'0' is not a list of numbers from 1 up"),
        (["4096x4096", "--group", "-1"], "'-1' is neither a size"),
        (["4096x4096", "--group", "all"], "'all' is neither a size"),
        (["4096x4096", "--mode", "off"], "invalid choice: 'off'"),
        (["4096x4096", "--report", "tuned"], "'tuned' ends in none of .json, .html"),
    ],
)
def test_a_mistake_is_told_with_status_2(
    arguments: list[str],
    message: str,
    measure: FakeMeasure,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status: object = main(["tune", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_fake_kernel_obeys_the_rules_of_a_template() -> None:
    assert FAST[0] == CLOSED.at(16)
    assert len(FAST) == 12
    assert isinstance(BEST, TileConfig)
