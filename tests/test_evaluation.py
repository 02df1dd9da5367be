"""lm-eval, by its own class for models of Hugging Face, on packed models: as the guide does it."""

import json
from inspect import cleandoc
from pathlib import Path
from typing import Any

import pytest
import torch

import fqcompile
import fqcompile.integrations.transformers  # opens packed weights for from_pretrained
from fqcompile.demo.gemma import gemma_missing, load_gemma
from fqcompile.weights.parameter import PackedWeight

DOCUMENTED = (json, torch.nn.Linear)  # their docstrings are the task
TASK = {
    "task": "docstrings",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    path = tmp_path / "texts.jsonl"
    documents = [cleandoc(thing.__doc__ or "")[:400] for thing in DOCUMENTED]
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return path


def bits_per_byte(model: Any, tokenizer: Any, texts: Path) -> tuple[float, bool]:
    """The harness's loss on the texts, of a model or of a directory that it opens.

    And whether its head, which shares a table in Gemma, was packed then: the harness ties weights.
    """
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    hugging_face = pytest.importorskip("lm_eval.models.huggingface")
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(texts)}}}
    given = {"pretrained": model, "tokenizer": tokenizer, "device": "cpu", "max_length": 128}
    harness = hugging_face.HFLM(**given)
    found = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=0)
    loss = float(found["results"]["docstrings"]["bits_per_byte,none"])
    return loss, isinstance(harness.model.lm_head.weight, PackedWeight)


@pytest.mark.slow
def test_gemma_s_loss_is_that_of_its_dequantized_weights(texts: Path, tmp_path: Path) -> None:
    """In fp32 all round alike but for the order of sums. What 4 bits cost is seen beside it."""
    if reason := gemma_missing():
        pytest.skip(reason)
    model, tokenizer = load_gemma(torch.float32)
    dense, _ = bits_per_byte(model, tokenizer, texts)
    directory = tmp_path / "int4"
    fqcompile.save(model, directory, plan=fqcompile.quantize_(model))
    opened = bits_per_byte(str(directory), tokenizer, texts)
    model.compile(backend="finequant", dynamic=True, options={"inner_backend": "eager"})
    compiled = bits_per_byte(model, tokenizer, texts)
    oracle, _ = bits_per_byte(fqcompile.restore(fqcompile.load(None, directory)), tokenizer, texts)
    # 18 * 7 + 1 products round by 2**-24 each; logits are up to 37, the loss is 3.8 nats a token:
    # 127**.5 * 2**-24 * 2 * 37 / 3.8 = 1.3e-5, and less in the mean. A dense head makes 1.8e-5.
    assert opened == (pytest.approx(oracle, rel=1e-5), True)
    assert compiled == (pytest.approx(oracle, rel=1e-5), True)
    assert dense < oracle < 1.2 * dense
