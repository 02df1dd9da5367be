"""SentenceTransformer on packed weights: quantized while loading, saved, opened, compiled.

The oracle is `quantize_` of the dense encoder with the same options.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
import transformers as hf
from sentence_transformers import SentenceTransformer

import fqcompile
from fqcompile.integrations.transformers import FineQuantHfConfig
from fqcompile.report import clear_reports
from fqcompile.weights.parameter import PackedWeight
from tests.helpers import finequant

OPTIONS: dict[str, Any] = {"granularity": 64, "min_elements": 1024}
SENTENCES = ["the cat sat", "a dog ran on the mat", "the mat", "a cat ran"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A BERT of two layers, and a tokenizer that knows these words."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*" ".join(SENTENCES).split()})]
    config = hf.BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    hf.BertModel(config).save_pretrained(tmp_path / "dense")
    vocab = {word: number for number, word in enumerate(words)}
    hf.BertTokenizer(vocab=vocab).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def embeddings(model: SentenceTransformer) -> Tensor:
    found: Tensor = model.encode(SENTENCES, convert_to_tensor=True)
    assert found.shape == (len(SENTENCES), 64) and found.isfinite().all()
    return found


def packed_names(model: SentenceTransformer) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, PackedWeight)}


def test_quantized_while_loading_saved_opened_and_compiled(directory: Path, tmp_path: Path) -> None:
    dense = SentenceTransformer(str(directory), device="cpu")
    exact = embeddings(dense)
    plan = fqcompile.quantize_(dense[0].model, calibration=None, **OPTIONS)
    expected = embeddings(dense)
    assert not torch.equal(expected, exact)

    given = {"quantization_config": FineQuantHfConfig(**OPTIONS)}
    loaded = SentenceTransformer(str(directory), device="cpu", model_kwargs=given)
    assert len(packed_names(loaded)) == len(plan.quantized) == 2 * 6 + 1
    assert torch.equal(embeddings(loaded), expected)

    loaded.save(str(tmp_path / "packed"))
    opened = SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert packed_names(opened) == packed_names(loaded)
    assert torch.equal(embeddings(opened), expected)

    clear_reports()
    encoder = opened[0].model
    encoder.forward = finequant(
        encoder.forward, min_elements=1024
    )  # which `encode` calls, not the module
    torch.testing.assert_close(embeddings(opened), expected, rtol=1e-4, atol=1e-5)
    assert any(report.plan.quantized for report in fqcompile.reports())
