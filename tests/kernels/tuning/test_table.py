"""Tables on disk: what is read back, what counts as empty and why, and who may write when."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.kernels.spec import A100, DENSE, H200, Config, TileConfig
from fqcompile.kernels.tuning import table as table_module
from fqcompile.kernels.tuning.table import (
    Case,
    Timing,
    Trial,
    TunedTable,
    table_for,
)
from tests.children import in_child

HERE = {"gpu": "NVIDIA H200", "sms": "132", "triton": "3.7.1", "kernels": "abc", "torch": "2.13.0"}
A, B = TileConfig(16, 128, 128), TileConfig(16, 64, 128, 8)
TIMING = Timing(20.5, 20.25, 21.0)


def _trial(config: Config, us: float) -> Trial:
    return Trial(config, Timing(us, us, us))


def _filled(path: Path) -> TunedTable:
    table = TunedTable.load(path, HERE)
    table.add("k1", 16, Trial(A, TIMING))
    table.add("k1", 16, Trial(B, refusal="OutOfResources: shared memory"))
    table.add("k1", None, _trial(DENSE, 900.0))
    table.finish("k1", 16, "fast")
    return table


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "t.json"
    written = _filled(path)
    read = TunedTable.load(path, HERE)
    for bucket in (16, None, 1):
        assert read.case("k1", bucket) == written.case("k1", bucket)
    case = read.case("k1", 16)
    assert case.trials == (Trial(A, TIMING), Trial(B, refusal="OutOfResources: shared memory"))
    assert case.searched == "fast"
    assert case.best == Trial(A, TIMING)
    assert read.case("k1", None) == Case((_trial(DENSE, 900.0),))
    assert read.case("k2", 16) == Case()
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "t.json"]


def test_a_case_knows_its_best_and_its_failure() -> None:
    refused = Trial(B, refusal="WrongResult: off")
    assert Case((_trial(A, 3.0), _trial(DENSE, 2.0), refused)).best == _trial(DENSE, 2.0)
    assert Case((_trial(A, 3.0), _trial(DENSE, 3.0))).best == _trial(A, 3.0)
    assert Case((refused,)).best is None
    assert Case((refused,)).failure == f"all 1 configurations failed, {B} with WrongResult: off"
    assert Case((refused, _trial(A, 1.0))).failure is None
    assert Case().failure is None
    assert [Case((), s).has("fast") for s in (None, "fast", "max")] == [False, True, True]
    assert [Case((), s).has("max") for s in (None, "fast", "max")] == [False, False, True]


@pytest.mark.parametrize("numbers", [(0, 0, 0), (1, 2, 3), (3, 1, 2), (float("inf"), 1, 2)])
def test_a_timing_is_three_ascending_numbers(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="low <= median <= high"):
        Timing(*numbers)


def _edited(path: Path, *keys: object, value: object) -> str:
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return json.dumps(content)


CASE = ("cases", "k1", "16")
TIME = (*CASE, "trials", 0, "microseconds")
EDITS: list[tuple[tuple[object, ...], object, str]] = [
    (("schema",), 2, "schema 2, this version reads 1"),
    (("fingerprint", "gpu"), "NVIDIA A100", "for gpu 'NVIDIA A100', here it is 'NVIDIA H200'"),
    (("fingerprint", "torch"), "2.12.0", "for torch '2.12.0', here it is '2.13.0'"),
    (("fingerprint",), {}, "KeyError"),
    (("fingerprint",), None, "TypeError"),
    (("cases",), [], "AttributeError"),
    (CASE, [], "TypeError"),
    ((*CASE, "trials"), 3, "TypeError"),
    ((*CASE, "searched"), "widely", "searched is 'widely'"),
    ((*CASE, "searched"), ["max"], "searched is"),
    ((*CASE, "trials", 0, "config"), "16x128", "tile config '16x128' is not of the form"),
    ((*CASE, "trials", 0, "config"), "16x128x100x1w4s3", "BLOCK_K=100 must be a power of two"),
    ((*CASE, "trials", 0, "config"), 7, "TypeError"),
    ((*CASE, "trials", 0), {"config": "dense"}, "KeyError"),
    (TIME, [1.0, 2.0, 3.0], "low <= median <= high"),
    (TIME, [float("nan")] * 3, "low <= median <= high"),
    (TIME, [-1.0, -1.0, -1.0], "low <= median <= high"),
    (TIME, [1.0], "TypeError"),
    (TIME, [10**400] * 3, "OverflowError"),
    (TIME, "fast", "ValueError"),
    (("cases", "k1"), {"sixteen": {"searched": None, "trials": []}}, "sixteen"),
]


@pytest.mark.parametrize(("place", "value", "reason"), EDITS, ids=lambda v: str(v)[:60])
def test_an_edited_table_is_a_miss_with_its_reason(
    place: tuple[object, ...],
    value: object,
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "t.json"
    _filled(path)
    path.write_text(_edited(path, *place, value=value))
    _assert_empty_but_usable(path, reason, caplog)


DAMAGED = {
    "empty": b"",
    "garbage": bytes(range(256)),
    "no object": b"[]",
    "deep": b"[" * 100_000,
    "many digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "text": "schema 1".encode("utf-16"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_a_miss(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    _assert_empty_but_usable(path, "Error", caplog)


@given(st.data())
def test_a_table_cut_anywhere_is_a_miss(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "t.json"
    _filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="length")])
    assert TunedTable.load(path, HERE).case("k1", 16) == Case()


@given(st.data())
def test_a_table_with_any_byte_changed_is_read_or_missed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("byte") / "t.json"
    _filled(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1), label="place")
    content[place] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(bytes(content))
    TunedTable.load(path, HERE).case("k1", 16)


def _assert_empty_but_usable(path: Path, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fqcompile"):
        table = TunedTable.load(path, HERE)
    assert table.case("k1", 16) == Case()
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    assert str(path) in caplog.messages[0]
    table.add("k9", 4, _trial(A, 1.0))
    assert TunedTable.load(path, HERE).case("k9", 4).best == _trial(A, 1.0)


def test_a_missing_table_is_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fqcompile"):
        assert TunedTable.load(tmp_path / "t.json", HERE).case("k1", 16) == Case()
    assert "FileNotFoundError" in caplog.text


@pytest.mark.parametrize("where", ["below a file", "in /proc", "a directory"])
def test_without_a_place_to_write_tuning_goes_on_in_memory(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "t.json").mkdir()
    path = {
        "below a file": tmp_path / "file" / "t.json",
        "in /proc": Path("/proc/fqcompile/t.json"),
        "a directory": tmp_path / "t.json",
    }[where]
    table = _filled(path)
    assert table.case("k1", 16).best == Trial(A, TIMING)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "FQCOMPILE_CACHE_DIR" in warnings[0]


@pytest.mark.parametrize("what", ["t.json", "."])
def test_a_table_that_others_could_have_written_is_not_used(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tuned" / "t.json"
    known = _filled(path).case("k1", 16)
    (path.parent / what).chmod(0o777)
    with caplog.at_level(logging.WARNING, "fqcompile"):
        table = TunedTable.load(path, HERE)
        assert table.case("k1", 16) == Case()
        table.add("k1", 16, _trial(A, 1.0))
    assert table.case("k1", 16) == Case((_trial(A, 1.0),))
    (said,) = caplog.messages
    assert "others may write to" in said and "set FQCOMPILE_CACHE_DIR" in said
    (path.parent / what).chmod(0o755)
    kept = TunedTable.load(path, HERE).case("k1", 16)
    assert kept == (Case((_trial(A, 1.0),)) if what == "t.json" else known)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_in_place_of_a_table_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tuned" / "t.json"  # a cache is warned of once in a process
    path.parent.mkdir()
    os.mkfifo(path)
    assert in_child(lambda: TunedTable.load(path, HERE).case("k1", 16), seconds=20) == Case()
    TunedTable.load(path, HERE)
    (said,) = caplog.messages
    assert "neither a file nor a directory" in said and "set FQCOMPILE_CACHE_DIR" in said


WRITER = """
import sys
from pathlib import Path
from tests.kernels.tuning.test_table import HERE, _trial
from fqcompile.kernels.tuning.table import TunedTable
from fqcompile.kernels.spec import TileConfig

path, own = Path(sys.argv[1]), int(sys.argv[2])
table = TunedTable.load(path, HERE)
print("ready", flush=True)
sys.stdin.readline()
for stages in range(1, 41):
    table.add(f"own{own}", 16, _trial(TileConfig(16, 16, 16, num_stages=stages), 1.0))
    table.add("shared", 16, _trial(TileConfig(16, 16, 16, own, num_stages=stages), 1.0))
"""


@pytest.mark.slow
def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    _filled(path)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(own)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in (1, 2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        json.loads(path.read_text())  # a reader never meets half a file
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    table = TunedTable.load(path, HERE)
    assert len(table.case("own1", 16).trials) == 40
    assert len(table.case("own2", 16).trials) == 40
    assert len(table.case("shared", 16).trials) == 80


def test_a_writer_learns_what_others_wrote(tmp_path: Path) -> None:
    mine, other = (TunedTable.load(tmp_path / "t.json", HERE) for _ in range(2))
    other.add("k1", 16, _trial(A, 2.0))
    mine.add("k2", 16, _trial(A, 3.0))
    assert mine.case("k1", 16).best == _trial(A, 2.0)


def test_a_narrow_search_does_not_undo_a_full_one(tmp_path: Path) -> None:
    for modes in (("fast", "max"), ("max", "fast")):
        table = TunedTable.load(tmp_path / f"{modes[0]}.json", HERE)
        for mode in modes:
            table.finish("k1", 16, mode)
        assert table.case("k1", 16).searched == "max"


def test_a_gpu_has_one_table_which_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path))
    table = table_for(H200)
    assert table.path.parent == tmp_path / "tuned"
    assert table.path.name.startswith("nvidia-h200-")
    assert table_for(replace(H200)) is table
    assert table_for(A100).path.name.startswith("nvidia-a100-sxm4-80gb-")
    monkeypatch.setattr(table_module, "kernel_source_hash", lambda: "other")
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path / "x" / ".."))
    assert table_for(H200).path.name != table.path.name
