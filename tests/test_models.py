"""Whole models: compiled equals eager with the dequantized weights, and nothing is forgotten."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
from transformers.pytorch_utils import Conv1D

import fqcompile
from fqcompile import FineQuantConfig
from tests.dense_models import CASES, build, run
from tests.helpers import (
    EveryForm,
    assert_close,
    assert_not_dense,
    finequant,
    frozen,
    oracle,
    quantized_names,
    report,
)

# The longest chain of rounded results in a layer: norm, q/k/v, scores, softmax, values, out, sum,
# norm, up, activation, down, sum; and twice that where a decoder attends to an encoder.
CHAIN = 12


def _matrices(model: nn.Module) -> dict[Tensor, int]:
    """Every weight that a linear layer of the model multiplies by, with its number of elements."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    return {layer.weight: layer.weight.numel() for layer in layers}


def _assert_nothing_forgotten(model: nn.Module) -> None:
    """Quantized: each linear layer's weight of at least min_elements. Kept: with a reason each."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    smallest = FineQuantConfig().min_elements
    expected = {w for w, elements in _matrices(model).items() if elements >= smallest}
    found = [parameters[site.name] for site in report().sites if site.status == "quantized"]
    assert len(found) == len(set(found))
    assert set(found) == expected
    for site in report().plan.kept:
        assert site.reason, site.name
        # a buffer may be multiplied with too, as the frequencies of a rotary embedding are
        if parameters.get(site.name) in _matrices(model):
            assert "min_elements" in site.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_model_equals_its_fake_quantized_self(name: str, dtype: torch.dtype) -> None:
    _compare(name, dtype)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_model_in_fp16(name: str) -> None:
    _compare(name, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_model_through_inductor(name: str) -> None:
    _compare(name, torch.float32, inner_backend="inductor")


def _compare(name: str, dtype: torch.dtype, **options: Any) -> None:
    model, inputs = build(name, dtype)
    before = model.get_input_embeddings().weight.clone() if CASES[name].tied_head else None
    actual = run(finequant(model, **options), inputs)
    expected = run(oracle(model), inputs)
    assert_close(actual, expected, depth=CHAIN * CASES[name].layers)
    assert_not_dense(actual, expected, run(model, inputs))
    _assert_nothing_forgotten(model)
    assert not report().warnings
    if before is not None:
        _assert_head_is_apart_from_its_embedding(model, before)


def _assert_head_is_apart_from_its_embedding(model: nn.Module, before: Tensor) -> None:
    """The head takes 8 bits, all else 4; the embedding that shares its weight is not touched."""
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    parameters = dict(model.named_parameters(remove_duplicate=False))
    (head,) = [s for s in report().plan.quantized if parameters[s.name] is embedding]
    assert head.bits == 8
    assert {s.bits for s in report().plan.quantized if s is not head} == {4}
    faked = oracle(model)
    assert torch.equal(embedding, before)
    assert torch.equal(faked.get_input_embeddings().weight, before)
    assert not torch.equal(faked.get_output_embeddings().weight, before)


def test_overrides_reach_the_sites_they_name() -> None:
    model, inputs = build("llama", torch.float32)
    overrides = {r"layers\.0\.mlp": {"bits": 8}, r"down_proj": {"granularity": 64}}
    run(finequant(model, overrides=overrides, exclude=[r"o_proj"]), inputs)
    plan = report().plan
    assert plan.site("model.layers.0.mlp.down_proj.weight").bits == 8
    assert plan.site("model.layers.1.mlp.down_proj.weight").group_size == 64
    assert plan.site("model.layers.1.mlp.up_proj.weight").bits == 4
    assert not any("o_proj" in name for name in quantized_names(plan.sites))
    reason = plan.site("model.layers.0.self_attn.o_proj.weight").reason
    assert reason == "name matches exclude pattern 'o_proj'"


@pytest.mark.parametrize("inner_backend", ["eager", "inductor"])
def test_every_matmul_form_equals_its_fake_quantized_self(inner_backend: str) -> None:
    model = frozen(EveryForm())
    x = torch.randn(3, 5, model.size)
    actual = finequant(model, inner_backend=inner_backend, min_elements=0)(x)
    expected, original = oracle(model)(x), model(x)
    for name in expected:
        assert_close(actual[name], expected[name], k=model.size, what=name)
        assert not torch.allclose(actual[name], original[name], rtol=1e-3), name
    # One site per weight, but the two halves of "chunks" are two and the four parts of "cat" one.
    assert len(report().plan.quantized) == len(expected) + 1
    assert not report().plan.kept


def test_generate_runs_quantized_where_the_model_is_compiled_in_place() -> None:
    model, inputs = build("llama", torch.float32)
    ask = {**inputs, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        wrapped = torch.compile(model, backend="finequant", options={"inner_backend": "eager"})
        wrapped.generate(**ask)
        assert not fqcompile.reports()
        model.compile(backend="finequant", options={"inner_backend": "eager"})
        actual = model.generate(**ask)
        expected = oracle(model, fqcompile.explain(model, example_kwargs=inputs)).generate(**ask)
    assert fqcompile.reports()[0].plan.quantized
    assert torch.equal(actual, expected)
