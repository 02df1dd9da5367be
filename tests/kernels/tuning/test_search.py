"""The search keeps each result at once, goes on after every failure, and resumes after a kill."""

import io
import logging
import os
import sys
from pathlib import Path

import pytest
import torch

from fqcompile.errors import FineQuantError
from fqcompile.kernels.tuning import launches
from fqcompile.kernels.tuning.key import tuning_key
from fqcompile.kernels.tuning.launches import Searched, search
from fqcompile.kernels.tuning.measure import DeviceLost, WrongResult
from fqcompile.kernels.tuning.table import Case, TunedTable
from tests.children import FORK
from tests.kernels.tuning.fake import FAST, MAX, SPEC, TEMPLATE, FakeMeasure

HERE = {"gpu": "NVIDIA H200"}
KEY = tuning_key(SPEC, TEMPLATE.layout.name)


def _table(directory: Path) -> TunedTable:
    return TunedTable.load(directory / "t.json", HERE)


def _search(
    directory: Path, measure: FakeMeasure, mode: str = "fast", bucket: int | None = 16
) -> Searched:
    return search(TEMPLATE, SPEC, bucket, mode, measure, _table(directory))  # type: ignore[arg-type]


def test_every_candidate_is_measured_once_at_the_buckets_rows(tmp_path: Path) -> None:
    measure = FakeMeasure()
    case, problem = _search(tmp_path, measure)
    assert measure.set_up == [16]
    assert measure.tried == list(FAST)
    assert problem is None
    assert case.best is not None
    assert case.best.config == FAST[-1]
    assert case.searched == "fast"
    assert _table(tmp_path).case(KEY, 16) == case
    again = FakeMeasure()
    assert _search(tmp_path, again) == (case, None)
    assert again.set_up == []


def test_the_open_bucket_is_measured_beyond_the_last_bound(tmp_path: Path) -> None:
    measure = FakeMeasure()
    _search(tmp_path, measure, bucket=None)
    assert measure.set_up == [2048]


def test_a_full_search_uses_what_a_fast_one_found(tmp_path: Path) -> None:
    _search(tmp_path, FakeMeasure())
    measure = FakeMeasure()
    case, _ = _search(tmp_path, measure, "max")
    assert measure.tried == list(MAX[len(FAST) :])
    assert case.searched == "max"
    assert len(case.trials) == len(MAX)


class OutOfResources(Exception):
    """As Triton's."""


FAULTS = [
    (
        OutOfResources("out of resource: shared memory\nHint: ..."),
        "OutOfResources: out of resource",
    ),
    (RuntimeError("PassManager::run failed"), "RuntimeError: PassManager::run failed"),
    (AssertionError(), "AssertionError: "),
    (WrongResult("relative error 0.7, allowed 0.01"), "wrong result: relative error 0.7"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=lambda v: type(v).__name__)
def test_a_refused_configuration_is_recorded_and_the_search_goes_on(
    fault: Exception, reason: str, tmp_path: Path
) -> None:
    fastest = FAST[-1]
    case, problem = _search(tmp_path, FakeMeasure({fastest: fault}))
    assert problem is None
    assert case.best is not None
    assert case.best.config == FAST[-2]
    refused = case.trial(fastest)
    assert refused is not None
    assert str(refused.refusal).startswith(reason)
    assert "\n" not in str(refused.refusal)
    assert _table(tmp_path).case(KEY, 16) == case


def test_where_all_fail_the_search_says_so_and_is_not_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = {config: OutOfResources("shared memory") for config in FAST}
    case, problem = _search(tmp_path, FakeMeasure(dict(faults)))
    assert case.best is None
    expected = f"all 12 configurations failed, {FAST[0]} with OutOfResources: shared memory"
    assert problem == expected
    assert expected in caplog.text
    again = FakeMeasure()
    assert _search(tmp_path, again) == (case, expected)
    assert not again.tried


def test_without_memory_to_measure_the_configuration_stays_untried(tmp_path: Path) -> None:
    fault = torch.OutOfMemoryError("CUDA out of memory")
    case, problem = _search(tmp_path, FakeMeasure({FAST[3]: fault}))
    assert problem == f"{FAST[3]} could not be measured: OutOfMemoryError: CUDA out of memory"
    assert case.searched is None
    assert len(case.trials) == len(FAST) - 1
    measure = FakeMeasure()
    assert _search(tmp_path, measure).problem is None
    assert measure.tried == [FAST[3]]


def test_where_nothing_can_be_set_up_nothing_is_recorded(tmp_path: Path) -> None:
    def broken(*_: object) -> object:
        raise FineQuantError("a CUDA graph is being captured")

    case, problem = _search(tmp_path, broken)  # type: ignore[arg-type]
    assert case == Case()
    assert problem is not None
    assert problem.endswith("FineQuantError: a CUDA graph is being captured")


def test_a_lost_device_ends_the_search_and_blames_one_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measure = FakeMeasure({FAST[2]: DeviceLost("illegal memory access")})
    case, problem = _search(tmp_path, measure)
    assert measure.tried == list(FAST[:3])
    assert problem == f"stopped after {FAST[2]}: DeviceLost: illegal memory access"
    assert problem in caplog.text
    measure = FakeMeasure()
    case, _ = _search(tmp_path, measure)
    assert measure.tried == list(FAST[3:])
    assert case.searched == "fast"


def test_a_search_stopped_by_hand_resumes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _search(tmp_path, FakeMeasure({FAST[5]: KeyboardInterrupt()}))
    measure = FakeMeasure()
    case, problem = _search(tmp_path, measure)
    assert measure.tried == list(FAST[5:])
    assert (case.searched, problem) == ("fast", None)


def test_a_killed_search_loses_at_most_the_trial_at_work(tmp_path: Path) -> None:
    ours, theirs = os.pipe()

    def search() -> None:
        sys.stdout = os.fdopen(theirs, "w")
        _search(tmp_path, FakeMeasure(seconds=0.05, announce=True))

    victim = FORK.Process(target=search, daemon=True)
    victim.start()
    os.close(theirs)
    with os.fdopen(ours) as announced:
        begun = [announced.readline().strip() for _ in range(4)]
        victim.kill()
        begun += announced.read().split()
    victim.join()
    assert begun == [str(config) for config in FAST[: len(begun)]]
    kept = [str(trial.config) for trial in _table(tmp_path).case(KEY, 16).trials]
    assert kept == begun[: len(kept)]
    assert len(begun) - len(kept) <= 1
    measure = FakeMeasure()
    case, problem = _search(tmp_path, measure)
    assert [str(config) for config in measure.tried] == [str(c) for c in FAST[len(kept) :]]
    assert (case.searched, problem) == ("fast", None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shows"), [(Terminal(), True), (io.StringIO(), False)])
def test_the_progress_bar_is_for_terminals(
    stream: io.StringIO, shows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    _search(tmp_path, FakeMeasure())
    assert ("tuning 4096x14336 int4 M=16" in stream.getvalue()) is shows
    assert bool(stream.getvalue()) is shows


def test_long_reasons_are_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    case, _ = _search(tmp_path, FakeMeasure({FAST[1]: RuntimeError("x" * 10_000)}))
    refused = case.trial(FAST[1])
    assert refused is not None
    assert len(str(refused.refusal)) == launches._LONGEST_REFUSAL
