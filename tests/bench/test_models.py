"""`bench models` on a tiny model without a GPU, and what is concluded from its rows."""

from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the bench extra is not installed")

from bench import interleaved, model_rows, models
from bench.decoding import Decoding
from bench.model_rows import allowed_error, clocked
from bench.model_table import extrapolated, model_table, tokens_per_second
from bench.model_zoo import MODELS, build, parameter_bytes
from bench.results import Row

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "ROUNDS", 1)


def arguments(*more: str) -> Any:
    given = ["--device", "cpu", "--inner", "eager", "--model", "tiny", "--layers", "1"]
    return models.parse([*given, "--batch", "2", "--context", "8", "--prompt", "4", *more])


def test_each_way_is_checked_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    results = models.run(arguments())
    rows = {(row["phase"], row["way"]): row for row in results.rows}
    assert set(rows) == {(p, w) for p in ("prefill", "decode") for w in model_rows.WAYS}
    assert not any("failure" in row for row in results.rows)
    for row in results.rows:
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert (row["layers"], row["of_layers"]) == (1, 4)
        if row["way"] != "inductor":
            assert row["error"] <= row["allowed"] == allowed_error(torch.bfloat16, 1)
            assert row["linear_bytes"] < 0.6 * row["linear_bytes_before"]
    models.show(results)
    assert capsys.readouterr().out.rstrip().splitlines()[-1].split()[:2] == ["tiny", "decode"]


def test_one_phase_alone_and_the_head_in_four_bits() -> None:
    rows = models.run(arguments("--phases", "decode")).rows
    assert {row["phase"] for row in rows} == {"decode"}
    held = {row["way"]: row.get("linear_bytes") for row in rows}
    assert held["int4 head"] < held["int4"] < held["int8"]


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_rows, "fake_quantize_", lambda model, report: model)
    rows = [row for row in models.run(arguments()).rows if row["way"] == "int4"]
    assert [row["failure"].partition(":")[0] for row in rows] == ["wrong result"] * 2


def test_a_step_attends_to_the_whole_context_and_starts_anew() -> None:
    model = build("tiny-opt", 1, torch.float32, CPU)
    with torch.no_grad():
        decoding = Decoding(model, 2, 8, 4)
        work = decoding.step_of(model, lambda step: step)
        decoding.rewind()
        first, second = work(), work()
        decoding.rewind()
        again = work()
        assert torch.equal(first, again)
        assert not torch.equal(first, second)  # a token later
        decoding.cache.layers[0].values[:, :, 3] += 1
        decoding.rewind()
        assert not torch.equal(work(), first)


@pytest.mark.parametrize("name", ["tiny", "tiny-opt"])
def test_a_model_is_drawn_in_its_type_and_keeps_the_size_of_values(name: str) -> None:
    before = torch.get_default_dtype()
    model = build(name, 2, torch.bfloat16, CPU)
    assert torch.get_default_dtype() == before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert parameter_bytes(model) == 2 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits.float()
    assert 0.1 < float(logits.std()) < 10


def test_the_models_have_the_known_numbers_of_weights() -> None:
    hf = pytest.importorskip("transformers")
    billions = {"llama-3-8b": 8.0, "opt-30b": 30.0, "opt-175b": 175.0}
    for name, expected in billions.items():
        shape = MODELS[name]
        config = getattr(hf, f"{shape.kind}Config")(**shape.sizes, num_hidden_layers=shape.layers)
        with torch.device("meta"):
            model = getattr(hf, f"{shape.kind}ForCausalLM")(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, rel=0.01)


def _row(way: str, layers: int, ms: float, **more: Any) -> Row:
    row = {"model": "m", "of_layers": 10, "phase": "decode", "batch": 4, "tokens": 64, "way": way}
    spread = {"low": ms - 0.1, "high": ms + 0.1, "over_inductor": 1.0}
    return row | {"layers": layers, "ms": ms} | spread | more


def test_all_layers_follow_from_two_counts_on_a_straight_line() -> None:
    rows = [_row("inductor", 2, 5.0), _row("int4", 2, 3.0), _row("inductor", 4, 9.0)]
    rows.append(_row("int4", 4, 5.0))
    plain, int4 = extrapolated(rows, "m", 10)
    assert (plain["ms"], int4["ms"]) == (21.0, 11.0)
    assert int4["over_inductor"] == pytest.approx(21 / 11)
    assert int4["extrapolated_from"] == [2, 4]
    assert tokens_per_second(int4) == pytest.approx(4000 / 11)
    text = model_table([*rows, plain, int4])
    assert "extrapolated from 2 and 4" in text
    assert "2 of 10" in text


def test_nothing_is_extrapolated_from_noise_or_one_count_or_all_layers() -> None:
    assert not list(extrapolated([_row("int4", 2, 5.0), _row("int4", 4, 5.1)], "m", 10))
    assert not list(extrapolated([_row("int4", 4, 5.0)], "m", 10))
    whole = [_row("int4", 5, 5.0), _row("int4", 10, 9.0)]
    assert not list(extrapolated(whole, "m", 10))


def test_what_there_was_no_time_for_is_named() -> None:
    results = models.run(arguments("--time-budget", "0"))
    assert results.left_out == ["tiny, 1 layers"]


def test_a_model_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "build", build)
    left_out = models.run(arguments()).left_out
    assert left_out == ["tiny, 1 layers: OutOfMemoryError: CUDA out of memory"]


def test_each_call_is_timed() -> None:
    calls: list[int] = []
    times = clocked(lambda: calls.append(1) or torch.zeros(()), 6, CPU)  # type: ignore[func-returns-value]
    assert len(times) == len(calls) == 6
    assert all(time > 0 for time in times)


def test_the_allowed_error_grows_with_the_root_of_the_depth() -> None:
    found = [allowed_error(torch.bfloat16, layers) for layers in (1, 4, 16, 64)]
    assert all(second == pytest.approx(2 * first) for first, second in pairwise(found))
    assert found[0] == pytest.approx(2 * 4 * 2.0**-8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "put back when the test ends")
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        models.main([])
