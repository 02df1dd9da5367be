"""`bench experts` with made-up kernels and a made-up clock: all of it but CUDA's own part."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.core.measure import Replay
from bench.core.shapes import EXPERTS, ExpertShape
from bench.experts import layers as expert_layers
from bench.experts import run as experts
from bench.experts.layers import (
    DENSE_WAY,
    GATHERED,
    GROUPED,
    GROUPED_MM,
    ExpertLayer,
    by_gathering,
    by_grouping,
)
from bench.experts.run import crossovers, table
from fqcompile.kernels.registry import KernelChoice
from fqcompile.kernels.spec import DENSE, H200
from fqcompile.kernels.tuning import measure as measure_module
from fqcompile.kernels.tuning.launches import CLOSED_FORM, Chosen
from fqcompile.kernels.tuning.measure import DeviceLost
from tests.kernels.tuning.fake import CLOSED, TEMPLATE, launches

CPU = torch.device("cpu")
SHAPE = ExpertShape(6, 2, 64, 48)
ARGUMENTS = ["--models", "small", "--tokens", "1,5", "--group", "32"]


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, the kernel of `fake`, and caches that hold little."""

    def candidates(spec: Any, m: int, mode: str) -> Sequence[Any]:
        return (CLOSED.at(1), DENSE)

    template = replace(TEMPLATE, candidates=candidates)
    monkeypatch.setattr(expert_layers, "select_kernel", lambda spec: KernelChoice(template))
    monkeypatch.setattr(
        expert_layers,
        "tuned_launches",
        lambda spec, template, tune: Chosen(launches(spec), CLOSED_FORM),
    )
    monkeypatch.setattr(measure_module, "ROTATED_BYTES", 1 << 16)
    monkeypatch.setitem(EXPERTS, "small", SHAPE)


def clock() -> Callable[[Sequence[Callable[[], object]]], Replay]:
    """Runs what it is to time once; each that comes later is said to take 10 us more."""
    seen: list[int] = []

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        assert len([call() for call in calls]) >= 2
        seen.append(1)
        time = 10.0 * len(seen)
        return lambda warm_ups, replays: [time] * replays

    return record


def run(*more: str, record: Any = None) -> experts.Results:
    return experts.run(experts.parse([*ARGUMENTS, *more]), CPU, H200, record or clock())


def layer(tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> ExpertLayer:
    return ExpertLayer(SHAPE, tokens, 4, 32, dtype, CPU, H200)


def plainly(hidden: Tensor, ids: Tensor, weights: Tensor, w: list[Tensor]) -> Tensor:
    rows = [
        sum((weights[t, i] * (w[e] @ hidden[t]) for i, e in enumerate(ids[t].tolist())), start=0)
        for t in range(len(hidden))
    ]
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_gathering_and_grouping_give_each_row_to_its_expert_and_sum(tokens: int) -> None:
    torch.manual_seed(0)
    hidden, weights = torch.randn(tokens, 4).double(), torch.randn(tokens, 2).double()
    ids = torch.rand(tokens, 6).topk(2).indices
    w = [torch.randn(4, 4).double() for _ in range(6)]

    def gathered(x: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([w[e] @ row for e, row in zip(ids.tolist(), x, strict=True)])

    def grouped(x: Tensor, offsets: Tensor) -> Tensor:
        assert offsets.dtype == torch.int32
        assert offsets[-1] == len(x)
        own = torch.searchsorted(offsets, torch.arange(len(x)), right=True)
        return gathered(x, own)

    def same(x: Tensor, rows_of: Tensor) -> Tensor:
        return x

    want = plainly(hidden, ids, weights, w)
    torch.testing.assert_close(by_gathering(hidden, ids, weights, 6, same, gathered), want)
    torch.testing.assert_close(by_gathering(hidden, ids, weights, 6, gathered, same), want)
    torch.testing.assert_close(by_grouping(hidden, ids, weights, 6, grouped, same), want)
    torch.testing.assert_close(by_grouping(hidden, ids, weights, 6, same, grouped), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_way_is_right_and_a_token_at_the_wrong_expert_is_seen(dtype: torch.dtype) -> None:
    small = layer(dtype=dtype)
    expected = small.expected(7)
    for way in small.ways(7, "off"):
        y = small.calls(way, 7)[0]()
        assert small.wrong_result(y, expected) is None, way.name
        other = y.clone()
        other[3] = y[4]
        assert "relative error" in str(small.wrong_result(other, expected))
        other[3] = torch.nan
        assert "not all elements are finite" in str(small.wrong_result(other, expected))


def test_routings_in_turn_read_other_experts_and_no_token_has_one_twice() -> None:
    small = layer()
    routings = small.token_ids(1)
    assert len(routings) == 3
    assert sorted(torch.cat(routings).flatten().tolist()) == list(range(6))
    for ids in small.token_ids(50):
        assert ids.shape == (50, 2)
        assert (ids[:, 0] != ids[:, 1]).all()
    way = next(iter(small.ways(1, "off")))
    assert small.copies >= 2
    assert len(small.calls(way, 1)) == min(64, 3 * small.copies)


def test_all_regimes_are_timed_with_their_configurations() -> None:
    rows = run().rows
    assert [row["tokens"] for row in rows] == [1] * 4 + [5] * 4
    assert [row["contender"] for row in rows[:4]] == [GATHERED, GROUPED, DENSE_WAY, GROUPED_MM]
    assert all(str(CLOSED.at(1)) in row["detail"] for row in rows[:2])
    assert rows[2]["detail"] == "gate_up dense, down dense"
    assert rows[0]["over_grouped_mm"] == 4.0  # said to take 10 us and 40
    assert rows[0]["of_ideal"] == pytest.approx(rows[0]["ideal_us"] / 10.0)


def test_a_wrong_way_is_not_timed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return x.new_ones(x.shape[0], w.shape[2])

    monkeypatch.setattr(torch, "_grouped_mm", grouped_mm)
    rows = [row for row in run().rows if row["contender"] == GROUPED_MM]
    assert all("wrong result: relative error" in row["failure"] for row in rows)
    assert all("us" not in row for row in rows)


def test_the_file_is_whole_and_what_there_was_no_time_for_is_named(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    run("--json", str(path))
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 8
    assert content["settings"]["models"] == ["small"]
    assert run("--time-budget", "0").left_out == ["small 1 tokens", "small 5 tokens"]


def test_a_lost_gpu_ends_the_run_and_keeps_what_there_was() -> None:
    steps: list[int] = []

    def record(calls: Sequence[Callable[[], object]]) -> Replay:
        steps.append(1)
        if len(steps) > 4:
            raise DeviceLost("an illegal memory access")
        return clock()(calls)

    results = run(record=record)
    assert [row["tokens"] for row in results.rows] == [1] * 4
    assert results.left_out == ["small 5 tokens and all after it: an illegal memory access"]


def made(model: str, tokens: int, **us: float) -> list[dict[str, Any]]:
    names = {"gathered": GATHERED, "grouped": GROUPED, "dense": DENSE_WAY, "torch": GROUPED_MM}
    return [
        {
            "model": model, "tokens": tokens, "contender": names[way], "ideal_us": 5.0, "us": time,
            "low": time, "high": time, "of_ideal": 5 / time, "over_grouped_mm": us["torch"] / time,
        }
        for way, time in us.items()
    ]  # fmt: skip


ROWS = [
    *made("a", 1, gathered=10, grouped=12, dense=90, torch=30),
    *made("a", 16, gathered=40, grouped=30, dense=90, torch=60),
    *made("a", 4096, grouped=900, dense=700, torch=600),
    *made("b", 1, gathered=7, grouped=8, torch=9),
]


def test_the_regimes_change_where_another_is_faster() -> None:
    """PyTorch's own is no regime of ours, however fast."""
    assert crossovers(ROWS) == [
        "a: gathered from 1, grouped from 16, dense from 4096 tokens", "b: gathered from 1 tokens"
    ]  # fmt: skip
    assert crossovers([{"model": "c", "tokens": 1, "contender": GATHERED, "failure": "why"}]) == [
        "c: nothing was timed tokens"
    ]


def test_the_table_shows_the_best_of_ours_against_pytorch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = table(ROWS).splitlines()
    assert lines[-4].split()[:7] == ["a", "1", "5.0", "10.0", "12.0", "90.0", "30.0"]
    assert lines[-4].split()[7:] == ["50%", "3.00x", "0.0%"]
    assert "0.86x" in lines[-2]
    experts.show(run())
    assert capsys.readouterr().out.splitlines()[-1].startswith("small: gathered from 1")
