"""The pipeline: its order, what it records, and that a failed pass loses nothing."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fqcompile.config import FineQuantConfig
from fqcompile.passes import pipeline
from fqcompile.passes.pipeline import PASSES, Recorder, analyze
from fqcompile.report import reports
from tests.passes.graphs import DEFAULTS, dynamo_graph, weight

WORDS = "capture normalize match plan rewrite fuse select lower".split()
X = torch.randn(4, 64)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False)


def replace_pass(monkeypatch: pytest.MonkeyPatch, word: str, step: Any) -> None:
    if word in PASSES:
        monkeypatch.setitem(PASSES, word, step)
    else:
        monkeypatch.setattr(pipeline, word, step)


def compiled(module: nn.Module, **options: object) -> torch.Tensor:
    function = torch.compile(module, backend="finequant", options={**DEFAULTS, **options})
    with torch.no_grad():
        return function(X)


def test_report_has_the_words_in_order_with_counts() -> None:
    compiled(model())
    passes = reports()[-1].passes
    assert [p.name for p in passes] == WORDS
    assert [p.count for p in passes] == [4, 0, 2, 2, 2, 1, 2, 2]
    assert all(p.seconds >= 0 for p in passes)
    assert "activation" in passes[WORDS.index("fuse")].matched[0]


def test_graphs_are_kept_only_where_asked_for() -> None:
    captured = dynamo_graph(model(), X)
    config = FineQuantConfig(**DEFAULTS)
    for keep in (False, True):
        recorder = Recorder(keep_graphs=keep)
        with torch.no_grad():
            analyze(captured.module, captured.args, config, recorder)
        texts = [p.after for p in recorder.records]
        assert all((text is not None) == keep for text in texts)
    (rewrite,) = (record for record in recorder.records if record.name == "rewrite")
    assert "fqcompile.matmul" not in rewrite.before
    assert "fqcompile.matmul" in rewrite.after


@pytest.mark.parametrize("word", WORDS)
def test_failed_pass_leaves_the_model_unquantized_and_says_so(
    word: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> int:
        raise ZeroDivisionError(f"broken {word}")

    replace_pass(monkeypatch, word, fails)
    module = model()
    with caplog.at_level(logging.WARNING, logger="fqcompile"):
        y = compiled(module)
    assert torch.equal(y, module(X))
    (warning,) = reports()[-1].warnings
    assert (
        f"runs unquantized: pass '{word}' failed with ZeroDivisionError: broken {word}" in warning
    )
    assert not reports()[-1].plan.sites
    assert warning in caplog.text


@pytest.mark.parametrize("word", WORDS)
def test_failed_pass_raises_where_asked_for(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> int:
        raise ZeroDivisionError(f"broken {word}")

    replace_pass(monkeypatch, word, fails)
    with pytest.raises(Exception, match=f"broken {word}"):
        compiled(model(), on_unsupported="error")


def test_pass_that_breaks_the_graph_is_caught_by_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "VERIFY", True)
    replace_pass(monkeypatch, "select", lambda state: state.packed.clear() or 0)
    module = model()
    assert torch.equal(compiled(module), module(X))
    assert "each op has exactly one packed weight" in reports()[-1].warnings[0]


def test_failure_for_a_second_instance_leaves_the_first_quantized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Layer(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight(64, 64, seed), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight)

    first, second = Layer(1), Layer(2)
    with torch.no_grad():
        second.weight[:, 0] = float("nan")
    run = torch.compile(Layer.forward, backend="finequant", options=DEFAULTS)
    with torch.no_grad():
        before = run(first, X)
        assert run(second, X).isnan().all()
        assert torch.equal(run(first, X), before)
    assert not torch.equal(before, first(X))
