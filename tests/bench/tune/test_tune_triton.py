"""`bench tune` with the real Triton family and its gate: interpreted, and the clock is made up."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench.core.measure import Replay
from bench.tune import run as tune
from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.spec import H200
from fqcompile.kernels.tuning import measure as measure_module
from fqcompile.kernels.tuning.table import Timing
from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.ptx import emulated_ptx

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """measure_on_gpu on a CPU: each trial takes a microsecond less than the one before."""
    times = count(50, -1)

    def told(*_: object) -> Timing:
        time = float(next(times))
        return Timing(time, time, time)

    monkeypatch.setattr(measure_module, "_DEVICE", CPU)
    monkeypatch.setattr(measure_module, "_time", told)
    monkeypatch.setattr(measure_module, "ROTATED_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with emulated_ptx(), interpreted():
        yield


def test_every_configuration_is_run_checked_and_the_rivals_again(no_gpu: None) -> None:
    recorded: list[int] = []

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        recorded.append(len(calls))
        return lambda warm_ups, replays: [10.0 + len(recorded)] * replays

    arguments = tune.parse(["--shapes", "64x256", "--group", "64", "--m", "3"])
    report = tune.run(arguments, CPU, H200, record)
    (case,) = report.cases
    (asked,) = tune.asked_for(arguments, H200)
    template = select_kernel(asked).template
    assert asked.m == 4 and case.rows == "M <= 4"
    expected = [str(config) for config in template.candidates(asked, 4, "fast")]
    assert [c.name for c in case.candidates] == expected
    assert not case.refused, "each gives what fp64 gives"
    assert (case.choice, case.best) == (expected[0], expected[-1])
    assert set(case.final) == {expected[0], expected[-1]}
    assert recorded == [2, 2], "both, each on two copies of the weight"
