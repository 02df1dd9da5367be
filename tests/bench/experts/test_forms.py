"""The table of forms: every stack of every layer is quantised, and errors are those of rounding."""

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
from bench.experts import forms as expert_forms
from tests.moe_models import LAYERS_OF_OUR_OWN


def test_rows_of_one_model_and_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_forms, "MODELS", {"mixtral": expert_forms.MODELS["mixtral"]})
    found = expert_forms.rows(torch.float32)
    assert [row.form for row in found] == ["grouped_mm", "batched_mm", *LAYERS_OF_OUR_OWN]
    for row in found:
        done, stacks = map(int, row.stacks.split("/"))
        assert done == stacks > 0, row
        # fp32 sums in another order, against the tenth that int4 costs each weight
        assert row.error < 1e-5 < 1e-2 < row.original, row
        assert 0.9 < row.share < 1, row
