"""`bench models` on a tiny model without a GPU, and what is concluded from its rows."""

from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the bench extra is not installed")

from bench.core import measure
from bench.core.results import Row
from bench.core.shapes import MODELS, build, parameter_bytes
from bench.models import rows as model_rows
from bench.models import run as models
from bench.models.phases import (
    Decoding,
    Prefill,
    Rates,
    experts_hit,
    flops_of,
    ideal_ms,
    random_tokens,
    weight_bytes_read,
)
from bench.models.rows import WAYS, Way, allowed_error, check_matrices, clocked, settle
from bench.models.section import extrapolated, tokens_per_second
from bench.models.section import models as section
from tests.bench.made_up_results import content

CPU = torch.device("cpu")
OURS = ("int8", "int4", "int4 head")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 1)


def arguments(*more: str) -> Any:
    given = ["--device", "cpu", "--inner", "eager", "--model", "tiny", "--layers", "1"]
    given += ["--batch", "2", "--context", "8", "--prompt", "4", "--ways", "inductor", *OURS]
    return models.parse([*given, *more])


def test_each_way_is_checked_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    results = models.run(arguments())
    rows = {(row["phase"], row["way"]): row for row in results.rows}
    assert set(rows) == {(p, w) for p in ("prefill", "decode") for w in ("inductor", *OURS)}
    assert not any("failure" in row for row in results.rows)
    for row in results.rows:
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert (row["layers"], row["of_layers"]) == (1, 4)
        assert row["error"] <= row["allowed"] == allowed_error(torch.bfloat16, 1)
        assert row["library"].split()[0] == ("torch" if row["way"] == "inductor" else "fqcompile")
        if row["way"] != "inductor":
            assert row["linear_bytes"] < 0.6 * row["linear_bytes_before"]
    models.show(results)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(lines) == len(results.rows)


@pytest.fixture(scope="module")
def decoded() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "ROUNDS", 1)
        return models.run(arguments("--phases", "decode"))


def test_one_phase_alone_and_the_head_in_four_bits(decoded: Any) -> None:
    rows = decoded.rows
    assert {row["phase"] for row in rows} == {"decode"}
    held = {row["way"]: row.get("linear_bytes") for row in rows}
    assert held["int4 head"] < held["int4"] < held["int8"]


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_rows, "fake_quantize_", lambda model, report: model)
    few = arguments("--phases", "decode", "--ways", "inductor", "int4")
    (row,) = (row for row in models.run(few).rows if row["way"] == "int4")
    assert row["failure"].partition(":")[0] == "wrong result"


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
    billions |= {"llama-1b": 1.24, "qwen3-30b-a3b": 30.5}
    for name, expected in billions.items():
        shape = MODELS[name]
        config = getattr(hf, f"{shape.kind}Config")(**shape.sizes, num_hidden_layers=shape.layers)
        with torch.device("meta"):
            model = getattr(hf, f"{shape.kind}ForCausalLM")(config)
        assert parameter_bytes(model) / 1e9 / model.dtype.itemsize == pytest.approx(
            expected, rel=0.01
        )


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
    text = section(content([*rows, plain, int4], dtype="bf16"))
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


def test_a_work_is_measured_with_each_number_of_threads() -> None:
    few = ("--ways", "inductor", "--context", "4", "--threads", "1,2", "--phases", "decode")
    before = torch.get_num_threads()
    try:
        results = models.run(arguments(*few))
    finally:
        torch.set_num_threads(before)
    assert [row["threads"] for row in results.rows] == [1, 2]
    assert set(results.settings["rates"]) == {"1", "2"}
    assert "decode 4, 2 threads" in section(results.content)


def test_each_phase_comes_in_each_size() -> None:
    asked = arguments("--context", "4,8", "--prompt", "3,5", "--phases", *models.PHASES)
    found = [about for about, _ in models.phases(build("tiny", 1, device=CPU), asked)]
    sizes = [(about["phase"], about["batch"], about["tokens"]) for about in found]
    assert sizes[:2] == [("decode", 2, 4), ("decode", 2, 8)]
    assert sizes[2:4] == [("prefill", 1, 3), ("prefill", 1, 5)]
    assert sizes[4:] == [("generate", 1, 3), ("generate", 1, 5)]


def test_whole_generations_are_checked_and_timed() -> None:
    few = ("--ways", "int4", "--phases", "generate", "--prompt", "6", "--new", "3")
    rows = models.run(arguments(*few)).rows
    (row,) = rows
    assert row["error"] <= row["allowed"]
    assert tokens_per_second(row) == pytest.approx(3e3 / row["ms"])


@pytest.mark.parametrize("context", [3, 6])
def test_a_step_past_a_sliding_window_is_like_the_one_before_it(context: int) -> None:
    hf = pytest.importorskip("transformers")
    config = hf.Gemma3TextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, vocab_size=64, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = hf.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        decoding = Decoding(model, 1, context, 3)
        assert decoding.context_bytes == 2 * 4 * 64 * (min(context, 4) + context)
        work = decoding.step_of(model, lambda step: step)
        decoding.rewind()
        first, second = work(), work()
        assert {layer.cumulative_length_int for layer in decoding.sliding} == {context + 1}
        decoding.rewind()
        assert torch.equal(work(), first)
        assert not torch.equal(second, first)


def test_a_model_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "build", build)
    left_out = models.run(arguments()).left_out
    assert left_out == ["tiny, 1 layers: OutOfMemoryError: CUDA out of memory"]


@torch.no_grad()
def test_a_step_of_experts_has_the_token_whose_experts_are_furthest_from_a_tie() -> None:
    model: Any = build("tiny-moe", 2, torch.float32)
    phase = Decoding(model, 1, 7, 3)
    context = random_tokens(model, 8)[:, :-1]

    def margin(token: torch.Tensor) -> float:
        tokens = torch.cat((context, token), 1)
        layers = model(input_ids=tokens, output_router_logits=True).router_logits
        best = [scores.view(1, 8, -1)[0, -1].sort(descending=True).values for scores in layers]
        return min(float(scores[1] - scores[2]) for scores in best)

    settle(phase, model)
    margins = [margin(token) for token in random_tokens(model, 16).split(1, dim=1)]
    assert margin(phase.tokens) == pytest.approx(max(margins), rel=1e-4)
    assert max(margins) > 2 * margins[0]


def test_each_call_is_timed() -> None:
    calls: list[int] = []
    times = clocked(lambda: calls.append(1) or torch.zeros(()), 6, CPU)  # type: ignore[func-returns-value]
    assert len(times) == len(calls) == 6
    assert all(time > 0 for time in times)


def test_the_allowed_error_grows_with_the_root_of_the_depth() -> None:
    found = [allowed_error(torch.bfloat16, layers) for layers in (1, 4, 16, 64)]
    assert all(second == pytest.approx(2 * first) for first, second in pairwise(found))
    assert found[0] == pytest.approx(2 * 4 * 2.0**-8)


def hand_counted(hidden: int, inner: int, kv: int, vocab: int, layers: int) -> dict[str, int]:
    """Of a Llama: weights of a layer's matrices, of a layer's norms, and of the head."""
    attention = hidden * hidden + 2 * kv * hidden + hidden * hidden
    return {
        "layers": layers * (attention + 3 * hidden * inner),
        "norms": hidden * (2 * layers + 1),
        "head": vocab * hidden,
    }


def test_the_ideal_is_what_is_counted_by_hand() -> None:
    """Two layers of the tiny Llama, heads of 64: 256 wide, 512 inside, keys of 128, 512 words."""
    model = build("tiny", 2, torch.bfloat16, CPU)
    n = hand_counted(256, 512, 128, 512, 2)
    assert weight_bytes_read(model) == 2 * sum(n.values())  # the embedding's table is not read
    decoding = Decoding(model, 3, 8, 4)
    assert decoding.context_bytes == 2 * 2 * 2 * 3 * 8 * 128  # bytes, K and V, layers, batch ...
    products = 2 * 3 * (n["layers"] + n["head"])
    assert flops_of(model, decoding) == products + 4 * 2 * 256 * 3 * 9
    products = 2 * 16 * n["layers"] + 2 * n["head"]  # logits of the last token alone
    pairs = sum(range(1, 17))
    assert flops_of(model, Prefill(model, 16)) == products + 4 * 2 * 256 * pairs
    assert ideal_ms(5e9, 1e9, Rates(1e10, 1e12)) == pytest.approx(500)
    assert ideal_ms(5e9, 1e12, Rates(1e10, 1e12)) == pytest.approx(1000)


def test_a_table_that_is_also_the_head_is_read() -> None:
    model = build("tiny-opt", 1, torch.bfloat16, CPU)
    positions = 2 * 256 * (2048 + 2)  # looked up in; OPT's begin at 2
    assert weight_bytes_read(model) == parameter_bytes(model) - positions


def test_shares_are_of_the_bytes_that_each_way_keeps(decoded: Any) -> None:
    """int8 by column and int4 in groups of 32 or more: bounds on the packed size, by hand."""
    results = decoded
    n = hand_counted(256, 512, 128, 512, 1)
    weights, rest = n["layers"] + n["head"], 2 * n["norms"] + 2 * 2 * 2 * 8 * 128
    bounds = {
        "inductor": (2 * weights, 2 * weights),
        "int8": (weights, weights * (1 + 2 / 32)),
        "int4": (n["layers"] / 2 + n["head"], (n["layers"] / 2 + n["head"]) * (1 + 4 / 32)),
        "int4 head": (weights / 2, weights / 2 * (1 + 4 / 32)),
    }
    (rates,) = (list(found.values()) for found in results.settings["rates"].values())
    flops = 2 * 2 * weights + 4 * 256 * 2 * 9
    for row in results.rows:
        low, high = bounds[row["way"]]
        assert low <= row["bytes_read"] - rest <= high, row["way"]
        ideal = 1e3 * max(row["bytes_read"] / rates[0], flops / rates[1])
        assert row["ideal_ms"] == pytest.approx(ideal)
        assert row["of_ideal"] == pytest.approx(ideal / row["ms"])


def test_of_experts_what_a_batch_is_expected_to_hit_is_read() -> None:
    """Eight, of which a token takes two; each 3 * 256 * 128."""
    model = build("tiny-moe", 1, torch.bfloat16, CPU)
    experts = 2 * 8 * 3 * 256 * 128
    rest = weight_bytes_read(model, 0)
    assert rest + experts == weight_bytes_read(model) == parameter_bytes(model) - 2 * 512 * 256
    assert experts_hit(model, 1) == 0.25
    assert experts_hit(model, 2) == 1 - 0.75**2
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    products = 2 * 3 * (linears + 2 * 3 * 256 * 128)
    assert flops_of(model, Decoding(model, 3, 8, 4)) == products + 4 * 256 * 3 * 9


def test_the_ideal_of_all_layers_is_on_the_same_line() -> None:
    few = _row("int4", 2, 5.0, ideal_ms=1.0, bytes_read=100)
    many = _row("int4", 4, 9.0, ideal_ms=1.5, bytes_read=140)
    (whole,) = extrapolated([few, many], "m", 10)
    assert (whole["ms"], whole["ideal_ms"], whole["bytes_read"]) == (21.0, 3.0, 260)
    assert whole["of_ideal"] == pytest.approx(3 / 21)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.WAYS, "torchao int4", Way("torchao int4", package="no_such_package"))
    asked = arguments("--ways", "torchao int4", "--time-budget", "0")
    assert models.run(asked).left_out[0] == "torchao int4: no_such_package is not installed"


def _rounded(groups: int, steps: int) -> Any:
    def change(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                w = module.weight.reshape(-1, groups)
                scale = w.abs().amax(1, keepdim=True) / steps
                module.weight = torch.nn.Parameter(
                    ((w / scale).round() * scale).view_as(module.weight)
                )

    return change


def test_what_a_library_makes_of_the_matrices_is_held_to_four_bits() -> None:
    model = build("tiny", 1, torch.bfloat16, CPU)
    for steps, right in ((7, True), (3, False)):
        changed = build("tiny", 1, torch.bfloat16, CPU)
        _rounded(128, steps)(changed)
        if right:
            check_matrices(changed, model)
            continue
        with pytest.raises(model_rows.WrongResult, match="q_proj: relative error"):
            check_matrices(changed, model)


def test_a_library_runs_a_copy_and_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Way("theirs", package="torch", change=_rounded(128, 7))
    model = build("tiny", 1, torch.bfloat16, CPU)
    before = model.lm_head.weight.clone()
    with torch.no_grad():
        phase = Decoding(model, 1, 4, 30)
        ways = [WAYS["inductor"], theirs]
        rows = list(model_rows.measured_rows(model, phase, ways, 1, "eager", Rates(1e10, 1e12)))
    assert torch.equal(model.lm_head.weight, before)
    assert not any("failure" in row for row in rows)
