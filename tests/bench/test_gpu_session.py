"""`bench gpu`, the identity and the budget: without a GPU and without waiting."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import gpu, replay, short
from bench.__main__ import BENCHMARKS
from bench.core import results
from bench.core.results import Budget, Results
from bench.core.steps import Step, planned, session
from bench.experts import run as experts
from bench.kernels import run as kernels
from bench.launch_overhead.run import host_microseconds
from bench.models import run as models
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.tuning.measure import DeviceLost
from fqcompile.kernels.tuning.table import Timing, Trial, TunedTable

ROOT = Path(__file__).parents[2]


def step(code: str, share: float = 1.0) -> Step:
    return Step(lambda out, seconds: (sys.executable, "-c", code), share)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {
        "good": step("print('a'); print('b')"),
        "bad": step("print('why'); raise SystemExit(3)"),
        "slow": step("import time; print('begun', flush=True); time.sleep(60)", 0.1),
    }
    monkeypatch.setattr(gpu, "PARTS", {1: made_up, 2: {}})


def test_no_step_stops_the_next(
    steps: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    options = ["--time-budget", "20", "--steps", "bad,slow,good"]
    with pytest.raises(SystemExit, match="1"):
        gpu.main(["--out", str(tmp_path / "out"), *options])
    assert time.monotonic() - start < 15
    table = capsys.readouterr().out.splitlines()[-4:-1]
    assert [line.split()[:2] for line in table] == [
        ["bad", "FAILED"], ["slow", "STOPPED"], ["good", "passed"]
    ]  # fmt: skip
    assert table[0].endswith("why")
    assert table[1].endswith("begun")
    assert (tmp_path / "out" / "log.txt").read_text() == "why\nbegun\na\nb\n"
    assert "good" in (tmp_path / "out" / "summary.txt").read_text()


def test_without_time_left_a_step_is_left_out(steps: None, tmp_path: Path) -> None:
    good = {"good": gpu.PARTS[1]["good"]}
    assert session(good, tmp_path, 0.5) == [("good", "no time", 0.0, "")]


@pytest.mark.parametrize("text", ["nan", "-1", "inf", "soon"])
def test_a_budget_is_a_number_of_seconds(
    text: str, steps: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path), f"--budget={text}"])
    assert f"'{text}' is not a number of seconds from 0 up" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(
    steps: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for wrong in (["--out", f"{tmp_path}/file"], ["--ahead", f"{tmp_path}/file/below"]):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(wrong)
        assert f"nothing can be written into {wrong[1]}: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--replay", str(tmp_path), "--budget", "3"])
    assert "unrecognized arguments: --budget 3" in capsys.readouterr().err


def test_a_second_command_loses_nothing_of_the_first(steps: None, tmp_path: Path) -> None:
    for _ in range(2):
        gpu.main(["--out", str(tmp_path), "--steps", "good"])
    assert (tmp_path / "log.txt").read_text() == 2 * "a\nb\n"


LOSES = """
import argparse, os, signal, sys
from pathlib import Path
from bench.core.results import Results
from fqcompile.kernels.tuning.measure import DeviceLost
def lost(): raise DeviceLost("gone")
def killed(): os.kill(os.getpid(), signal.SIGKILL)
results = Results.of(argparse.Namespace(json=Path(sys.argv[2])), __import__("torch").device("cpu"))
ways = dict(a=lambda: [{"n": 1}], b=lost, c=lambda: [{"n": 3}], d=killed)
results.fill(ways.items(), 1e6)
print(len(results.rows), "rows")
"""


@pytest.mark.slow
def test_a_benchmark_that_loses_the_gpu_or_is_killed_goes_on_behind_what_did_it(
    tmp_path: Path,
) -> None:
    """Each in a process of its own, and what an earlier session left is not taken up."""
    file = tmp_path / "kernels.json"
    file.write_text('{"rows": [{"n": 0}], "left_out": [], "under_way": "d"}')
    command = (sys.executable, "-c", LOSES, "--json", str(file))
    steps = {"loses": Step(lambda out, seconds: command)}
    ((_, end, *_, last),) = session(steps, tmp_path, 120.0, "log.txt")
    assert (end, last) == ("passed, 2 lost", "2 rows")
    content = json.loads(file.read_text())
    assert [row["n"] for row in content["rows"]] == [1, 3]
    assert content["left_out"] == ["b: gone", "d: its process ended"]
    assert "under_way" not in content


def test_between_two_steps_none_is_under_way(tmp_path: Path) -> None:
    """What makes the next one fails: then nothing is to be passed over."""
    file = tmp_path / "kernels.json"

    def steps() -> Iterator[results.Step]:
        yield "a", lambda: [{"n": 1}]
        raise MemoryError

    with pytest.raises(MemoryError):
        Results({}, {}, file).fill(steps(), 1e6)
    assert json.loads(file.read_text())["rows"] == [{"n": 1}]
    assert "under_way" not in json.loads(file.read_text())


def test_a_process_that_does_not_get_further_is_not_begun_again(tmp_path: Path) -> None:
    """It fails before its first step."""
    file = tmp_path / "kernels.json"
    code = f"open({str(file)!r}, 'w').write('{{\"under_way\": \"a\"}}'); raise SystemExit(1)"
    command = (sys.executable, "-c", code, "--json", str(file))
    ((_, end, *_),) = session({"bad": Step(lambda *_: command)}, tmp_path, 60.0)
    assert end == "FAILED (1), 1 lost"


def test_what_a_stopped_step_has_started_is_stopped_too(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; print('on', flush=True); time.sleep(3); open({str(late)!r}, 'w')"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    steps = {"slow": step(f"import subprocess, sys, time; {start}; time.sleep(60)")}
    ((_, end, *_, last),) = session(steps, tmp_path, 2.0)
    assert (end, last) == ("STOPPED after 2 s", "on")
    time.sleep(2)
    assert not late.exists()


@pytest.mark.parametrize("part", [1, 2])
def test_what_is_expected_fits(part: int) -> None:
    rows = planned(gpu.PARTS[part], 420)
    assert all(0 < expected <= most for _, expected, most in rows), rows
    assert sum(expected for _, expected, _ in rows) <= 420


PARSERS = {"kernels": kernels.parse, "experts": experts.parse, "models": models.parse}


@pytest.mark.parametrize("parts", [gpu.PARTS, gpu.DRY], ids=["gpu", "dry"])
@pytest.mark.parametrize("part", [1, 2])
def test_every_command_is_one_that_there_is_and_at_most_eight_files_come_back(
    part: int, parts: dict[int, dict[str, Step]]
) -> None:
    files = {"log.txt", "summary.txt"}
    for known in parts[part].values():
        command = list(known.command(Path("out"), 100.0))
        files |= set(re.findall(r"out/([\w-]+\.jsonl?)", " ".join(command)))
        if "bench" in command:
            name, *flags = command[command.index("bench") + 1 :]
            assert name in BENCHMARKS
            if name in PARSERS:
                assert PARSERS[name](flags).time_budget == 85
        tests = [text for text in command if text.startswith("tests/")]
        assert all((ROOT / path).exists() for path in tests)
    assert len(files) <= 8, files


def test_the_result_of_a_test_is_on_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "tests.jsonl"
    monkeypatch.setenv("BENCH_TESTS", str(log))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    report = SimpleNamespace(
        when="setup", passed=True, failed=False, nodeid="a.py::b", outcome="passed", duration=0.125
    )
    gpu.pytest_runtest_logreport(report)
    report.when = "call"
    gpu.pytest_runtest_logreport(report)
    report.failed, report.passed, report.outcome, report.longrepr = True, False, "failed", "x" * 999
    gpu.pytest_runtest_logreport(report)
    passed, failed = map(json.loads, log.read_text().splitlines())
    assert passed == {"test": "a.py::b", "outcome": "passed", "seconds": 0.12}
    assert len(failed["why"]) == 600


LOSING = """
import torch
def lost():
    raise RuntimeError("CUDA error: an illegal memory access")
def test_loses():
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), lost
    lost()
def test_after():
    assert torch.cuda.synchronize is not lost
"""


@pytest.mark.slow
def test_a_worker_whose_gpu_a_test_has_lost_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    log = tmp_path / "tests.jsonl"
    (tmp_path / "test_losing.py").write_text(LOSING)
    # The path of a test that is not of this checkout, so that its conftest is left alone.
    options = ("-p", "bench.gpu", "-p", "no:cacheprovider", "-n", "1", "--rootdir", str(tmp_path))
    command = ["env", "-u", "PYTEST_XDIST_WORKER", f"BENCH_TESTS={log}", f"PYTHONPATH={ROOT}",
               sys.executable, "-m", "pytest", *options, "test_losing.py"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    ended = {row["test"].rpartition("::")[2]: row["outcome"] for row in rows}
    assert ended == {"test_loses": "failed", "test_after": "passed"}
    assert any("illegal memory access" in row.get("why", "") for row in rows)


def test_what_came_back_becomes_results_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for a file that was cut off on its way."""
    back, root = tmp_path / "back", tmp_path / "results"
    back.mkdir()
    source = ROOT / "bench" / "results" / "amd-epyc" / "memory.json"
    content = json.loads(source.read_text())
    content["identity"]["device"] = "NVIDIA H200"
    (back / "memory.json").write_text(json.dumps(content))
    (back / "tuned.json").write_text("{}")
    (back / "kernels.json").write_text(json.dumps(content)[:-9])
    page = tmp_path / "README.md"
    (tmp_path / "docs" / "guide").mkdir(parents=True)
    for name in ("README.md", "docs/results.md", "docs/guide/choosing.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    results_page = tmp_path / "docs" / "results.md"
    replay.replay([back], root, page)
    assert (root / "nvidia-h200" / "memory.json").exists()
    assert not (root / "nvidia-h200" / "tuned.json").exists()
    assert "NVIDIA H200" in results_page.read_text()
    printed = capsys.readouterr().out
    assert f"{back / 'kernels.json'} is left out: it is no whole JSON" in printed
    assert not (root / "nvidia-h200" / "kernels.json").exists()
    assert "error" in printed


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "null", '"x"', "[" * 20000, "\x00", '{"identity": {}, "rows": []}',
        '{"identity": {"device": "x"}, "settings": {}, "left_out": [], "rows": [3]}',
        '{"fingerprint": {}, "schema": 1}', '{"fingerprint": {"gpu": "x"}, "schema": 1}',
    ],
)  # fmt: skip
def test_damaged_files_are_left_out(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back, root = tmp_path / "back", tmp_path / "results"
    with pytest.raises(SystemExit, match=r"--replay: .*back is no folder"):
        replay.replay([back], root)
    back.mkdir()
    (back / "kernels.json").write_text(text)
    with pytest.raises(SystemExit, match=r"--replay: no file of results in .*back is whole"):
        replay.replay([back], root)
    assert "kernels.json is left out: it " in capsys.readouterr().out
    assert not root.exists()


def test_a_tuned_table_that_came_back_is_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay.readme, "main", lambda *arguments, **named: None)
    back, root = tmp_path / "back", tmp_path / "results"
    back.mkdir()
    root.mkdir()
    table = TunedTable.load(back / "tuned.json", {"gpu": "NVIDIA H200"})
    first, best = (TileConfig(16, 64, 128, num_stages=stages) for stages in (3, 4))
    for config, us in ((first, 12.0), (best, 8.0)):
        table.add("dense 8192x8192", 16, Trial(config, Timing(us, us, us)))
    table.add("dense 64x64", None, Trial(first, refusal="no shared memory"))
    replay.replay([back], root, tmp_path / "README.md")
    kept = TunedTable.load(root / "nvidia-h200" / "tuned.json", table.fingerprint)
    assert kept.case("dense 8192x8192", 16) == table.case("dense 8192x8192", 16)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "8192x8192" in line]
    assert line.split() == (
        ["dense", "8192x8192", "16", str(best), "8.0", "[8.0,", "8.0]", str(first), "1.50x"]
    )
    assert "all 1 configurations failed" in printed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub would take the GPU's place")
def test_kernels_built_ahead_are_found_by_who_has_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--ahead", str(tmp_path), "--dry"]
    made = []
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        made.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")})
    assert {path.name for path in made[0]} == {"gemm_kernel.cubin", "dequantize_kernel.cubin"}
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2])
def test_a_dry_run_executes_every_command_that_needs_no_gpu(part: int, tmp_path: Path) -> None:
    gpu.main(["--part", str(part), "--dry", "--out", str(tmp_path), "--budget", "900"])
    written = {path.name for path in tmp_path.iterdir()}
    wanted = {
        1: {"tests.jsonl", "kernels-cpu.json"},
        2: {"models-cpu.json", "launch-overhead.json"},
    }
    assert {"log.txt", "summary.txt", *wanted[part]} <= written
    assert len(written) <= 8
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["rows"] and not content["left_out"], path


def test_the_short_suite_goes_on_after_a_failure_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up = {"bad": step("raise SystemExit(2)"), "good": step("print('fine')")}
    monkeypatch.setattr(short, "STEPS", made_up)
    with pytest.raises(SystemExit, match="1"):
        short.main(["--out", str(tmp_path), "--steps", "bad,good"])
    printed = capsys.readouterr().out
    *_, bad, good, where = printed.splitlines()
    assert where.endswith(f"results and logs lie in {tmp_path}")
    assert [line.split()[:2] for line in (bad, good)] == [
        ["bad", "FAILED"], ["good", "passed"]
    ]  # fmt: skip
    short.main(["--out", str(tmp_path), "--steps", "good"])


def test_the_short_suite_runs_benchmarks_that_are_there_into_a_folder_git_ignores() -> None:
    for name, known in short.STEPS.items():
        command = list(known.command(Path("out"), 100.0))
        assert command[command.index("bench") + 1] == name
        assert any(text.startswith("out") for text in command), name
    assert set(short.STEPS) <= set(BENCHMARKS)
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", str(short.OUT)])
    assert ignored.returncode in (0, 128)  # 128: no checkout


def test_a_folder_is_named_after_the_device() -> None:
    assert results.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert results.slug("AMD EPYC (x)") == "amd-epyc-x"


def test_who_copied_the_checkout_says_which_commit_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert results.commit() == "abc"
    monkeypatch.delenv("BENCH_COMMIT")
    monkeypatch.setattr(results, "_git", lambda *arguments: None)
    assert results.commit() == "unknown"
    answers = {"rev-parse": "def", "status": " M x"}
    monkeypatch.setattr(results, "_git", lambda command, *rest: answers[command])
    assert results.commit() == "def+"
    assert results.identity(torch.device("cpu"))["commit"] == "def+"


def test_a_library_is_named_with_its_version_and_a_checkout_without() -> None:
    assert results.with_version("torch") == f"torch {version('torch')}"
    assert results.with_version("bench") == "bench not installed"


def test_a_step_begins_where_the_longest_so_far_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    budget = Budget(10.0)
    allowed = []
    for moment in (0.0, 4.0, 5.0, 6.5):
        clock[0] = moment
        allowed.append(budget.allows_a_step())
    assert allowed == [True, True, True, False]
    assert budget.left == 3.5


def test_an_error_that_tells_of_a_lost_gpu_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(error: Exception) -> None:
        raise DeviceLost("gone") from error

    def fails() -> list[results.Row]:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "check_device", lost)
    found = Results({}, {})
    found.fill([("a", lambda: [{"n": 1}]), ("b", fails), ("c", lambda: [{"n": 3}])], 1e6)
    assert found.rows == [{"n": 1}]
    assert found.left_out == ["b and all after it: gone"]


def test_host_time_is_of_one_call_and_taken_in_turn() -> None:
    order: list[str] = []
    run = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = host_microseconds(run, calls=3, repeat=2, synchronize=lambda: order.append("|"))
    assert "".join(order) == "|aaa|bbb" * 3 + "|"
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


@pytest.mark.slow
def test_the_overhead_is_measured_with_a_stub_in_place_of_the_launch() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = ["launch_overhead", "--device", "cpu", "--calls", "5", "--repeat", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "bench", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "STUB" in result.stdout
    for way in ("Triton's launcher", "dequant_gemm", "operator, no_grad"):
        assert way in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["kernels", "experts", "models"])
def test_without_a_gpu_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "put back when the test ends")
    monkeypatch.setattr(sys, "argv", ["bench", name])
    with pytest.raises(SystemExit, match=f"bench {name}: .*torch sees no GPU on this machine"):
        command.main()
