"""An exported model is, bit for bit, what its codes say: by transformers and by the library."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

import fqcompile
from fqcompile.weights.parameter import PackedWeight
from tests.interop.models import (
    OPTIONS,
    assert_same_tensors,
    library_dense,
    make,
    save_quantized,
    tensors_of,
)

DENSE = ("llama", "qwen3", "opt", "gemma3", "phi3")
MOE = ("mixtral", "qwen3-moe", "deepseek-v3", "llama4")
# Experts are one tensor in the checkpoint too, and stay dense.
FUSED_EXPERTS = ("gpt-oss", "granite-moe")


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


CASES = [
    *((name, "portable") for name in (*DENSE, *MOE, *FUSED_EXPERTS)),
    *((name, "serve") for name in ("llama", *MOE)),
]


@pytest.mark.parametrize(("name", "profile"), CASES)
def test_exported_values_are_the_fake_quantized_ones(
    name: str, profile: str, tmp_path: Path
) -> None:
    model, inputs = make(name, tmp_path / "plain")
    oracle = save_quantized(model, tmp_path / "saved")
    plan = fqcompile.export(tmp_path / "saved", tmp_path / "out", profile=profile)
    assert len(plan.quantized) >= 8, plan
    if name != "llama4":  # whose experts are one tensor where they are dense
        oracle.save_pretrained(tmp_path / "oracle")
        expected = tensors_of(tmp_path / "oracle")
        if "lm_head.weight" not in expected:  # tied, and the head was quantized alone
            expected["lm_head.weight"] = oracle.lm_head.weight
        assert_same_tensors(library_dense(tmp_path / "out"), expected)
    if profile == "portable" or name not in MOE:
        loaded = type(model).from_pretrained(tmp_path / "out").eval()
        assert torch.equal(logits(loaded, inputs), logits(oracle, inputs))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_library_makes_it_dense_by_its_config(name: str, tmp_path: Path) -> None:
    """By the converter of compressed-tensors, which refuses a checkpoint with parts left over."""
    model, _ = make(name, tmp_path / "plain")
    oracle = save_quantized(model, tmp_path / "saved")
    fqcompile.export(tmp_path / "saved", tmp_path / "out")
    oracle.save_pretrained(tmp_path / "oracle")
    reader = CompressedTensorsDequantizer(tmp_path / "out")
    actual = reader.validate(tensors_of(tmp_path / "out"))
    assert_same_tensors(actual, tensors_of(tmp_path / "oracle"))


@pytest.mark.parametrize("name", MOE)
def test_transformers_loads_what_is_to_be_served_if_all_experts_are_alike(
    name: str, tmp_path: Path
) -> None:
    model, inputs = make(name, tmp_path / "plain")
    oracle = save_quantized(model, tmp_path / "saved", overrides={}, granularity=32)
    fqcompile.export(tmp_path / "saved", tmp_path / "out", profile="serve")
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, inputs), logits(oracle, inputs))


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_float32_models_too(name: str, tmp_path: Path) -> None:
    model, inputs = make(name, tmp_path / "plain", torch.float32)
    oracle = save_quantized(model, tmp_path / "saved")
    fqcompile.export(tmp_path / "saved", tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded, inputs), logits(oracle, inputs))


@pytest.mark.parametrize("name", ["gemma3", "qwen3-moe"])
def test_checkpoint_of_hugging_face_is_quantized_on_the_way(name: str, tmp_path: Path) -> None:
    model, inputs = make(name, tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").write_text('{"made": "up"}')
    plan = fqcompile.export(tmp_path / "plain", tmp_path / "out", **OPTIONS)
    options = {"exclude": ["lm_head"], "calibration": None}  # a checkpoint's files do not run
    oracle = save_quantized(model, tmp_path / "saved", **options)
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, inputs), logits(oracle, inputs))
    head = plan.site("lm_head.weight")
    assert (head.status, head.reason) == ("kept", "engines keep output heads dense")
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"made": "up"}'
    assert not (tmp_path / "out.partial").exists()
    assert loaded.generation_config == model.generation_config


@pytest.mark.parametrize("profile", ["portable", "serve"])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "deepseek-v3", "llama4"])
def test_import_gives_back_the_saved_model(name: str, profile: str, tmp_path: Path) -> None:
    """Repeated scales and widened codes are undone."""
    model, inputs = make(name, tmp_path / "plain")
    save_quantized(model, tmp_path / "saved", exclude=["lm_head"])
    fqcompile.export(tmp_path / "saved", tmp_path / "out", profile=profile)
    saved, loaded = fqcompile.load(None, tmp_path / "saved"), fqcompile.load(None, tmp_path / "out")
    other = dict(loaded.named_parameters())
    for key, weight in saved.named_parameters():
        assert isinstance(other[key], PackedWeight) == isinstance(weight, PackedWeight), key
        if isinstance(weight, PackedWeight):
            assert torch.equal(other[key].dequantized(), weight.dequantized()), key
            assert other[key].packed_bytes <= weight.packed_bytes, key
        else:
            assert torch.equal(other[key], weight), key
    assert torch.equal(logits(loaded, inputs), logits(saved, inputs))
