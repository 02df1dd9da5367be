"""`bench memory`: what is measured, which results are wrong, and what says that it is not there."""

import argparse
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the bench extra is not installed")

from bench.core import processes
from bench.core.processes import ChildFailed
from bench.core.results import Row
from bench.core.shapes import build, prompt
from bench.start import memory
from fqcompile.kernels.tuning.measure import WrongResult
from tests.bench.made_up_results import cells

TINY, LAYERS = "tiny", 2
MIB = 2**20


def row(way: str, mib: int, *, ours: bool = True, logits: tuple[float, ...] = (1, 2, 3)) -> Row:
    figures = dict.fromkeys(("loaded", "peak", "after", "own", "imports"), mib * MIB)
    return {"way": way, "ours": ours, "logits": list(logits), **figures}


def test_ours_must_agree_exactly_and_others_to_four_bits() -> None:
    plain = row("bf16", 1, ours=False)
    keep = memory.same_logits(row("keep", 1, logits=(1.1, 2.1, 2.9)), [plain], 2)
    assert 0.01 < keep["error"] < 0.1
    memory.same_logits(row("free", 1, logits=(1.1, 2.1, 2.9)), [plain, keep], 2)
    with pytest.raises(WrongResult, match="from keep, allowed"):
        memory.same_logits(row("load", 1, logits=(1, 2.3, 2.7)), [plain, keep], 2)
    with pytest.raises(WrongResult, match="from bf16, allowed"):
        memory.same_logits(row("torchao", 1, ours=False, logits=(-1, -2, 3)), [plain, keep], 2)
    with pytest.raises(WrongResult, match="nan from bf16"):
        memory.same_logits(row("keep", 1, logits=(float("nan"), 2, 3)), [plain], 2)


def test_rows_come_from_second_processes_and_failures_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(module: str, flags: list[str], environment: dict[str, str]) -> Row:
        assert module == "bench.start.memory"
        assert environment["FQCOMPILE_CACHE_SIZE"] == "0"
        way = flags[-1]
        ran.append(way)
        if way == "torchao":
            raise ChildFailed("torchao is not installed")
        return row(way, len(ran), ours=way != "bf16")

    monkeypatch.setattr(memory, "in_fresh_process", run)
    memory.main(["--size", "tiny", "--way", "bf16", "finequant", "load", "torchao"])
    assert ran == ["bf16", "bf16", "finequant", "finequant", "save", "load", "load", "torchao"]
    printed = capsys.readouterr().out
    assert "torchao: ChildFailed: torchao is not installed" in printed
    assert cells(printed, "load")[1] == "7"


def test_every_way_has_a_name_of_its_own_and_is_measured_by_default() -> None:
    arguments = memory.parse([])
    assert arguments.way == list(memory.WAYS)
    assert len(set(arguments.way)) == len(arguments.way)
    assert arguments.way[0] == memory.PLAIN  # the others are compared with it


def test_a_way_takes_what_it_allocates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held: list[torch.Tensor] = []

    def greedy(model: torch.nn.Module) -> Any:
        held.append(torch.ones(64 * MIB, dtype=torch.uint8))
        torch.ones(128 * MIB, dtype=torch.uint8)
        return model

    monkeypatch.setitem(memory.OF_A_MODEL, memory.PLAIN, greedy)
    found = memory.took(memory.PLAIN, TINY, LAYERS, tmp_path)
    assert found["peak"] - found["loaded"] > 150 * MIB
    assert 50 * MIB < found["own"] < found["peak"]
    assert len(found["logits"]) == 256
    assert found["ours"] is False


def test_peaks_are_of_what_follows_the_reset() -> None:
    """Beside what is resident then: the system may take pages of files away at any time."""

    def above() -> int:
        return processes.peak() - processes.resident()

    with mmap.mmap(-1, 256 * MIB) as pages:  # the allocator may keep what a tensor gives back
        torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    assert above() > 200 * MIB
    processes.reset_peak()
    assert above() < 50 * MIB
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert processes.anonymous() >= held.nbytes
    assert processes.anonymous() <= processes.resident() <= processes.peak()


def test_the_model_is_the_same_each_time_and_no_two_matrices_are_alike() -> None:
    model, again = build(TINY, LAYERS), build(TINY, LAYERS)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    matrices = [p for p in model.parameters() if p.dim() == 2]
    corners = {tuple(p[:4, :4].flatten().tolist()) for p in matrices}
    assert len(corners) == len(matrices)
    with torch.no_grad():
        logits = model(prompt(TINY)).logits.float()
    assert 0.1 < float(logits.std()) < 10


def test_a_model_to_load_into_has_no_weights() -> None:
    empty = build(TINY, LAYERS, device="meta")
    assert all(p.device.type == "meta" for p in empty.parameters())


def test_sizes_and_layers_reach_the_process() -> None:
    arguments = argparse.Namespace(**vars(memory.parse(["--layers", "3", "--size", "tiny"])))
    assert (arguments.layers, arguments.size) == (3, "tiny")
