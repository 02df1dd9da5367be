"""Whole models: compiled equals eager with the dequantised weights, and nothing is forgotten."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf
from transformers.pytorch_utils import Conv1D

from fqcompile import FineQuantConfig
from tests.helpers import (
    EveryForm,
    assert_close,
    finequant,
    frozen,
    oracle,
    quantized_names,
    report,
)

VOCAB, WIDTH, LAYERS = 512, 128, 2
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": VOCAB,
    "initializer_range": WIDTH**-0.5,  # a linear layer keeps the size of its input
}
# The longest chain of rounded results in a layer: norm, q/k/v, scores, softmax, values, out, sum,
# norm, up, activation, down, sum; and twice that where a decoder attends to an encoder.
CHAIN = 12


def _ids(length: int = 7) -> Tensor:
    return torch.randint(0, VOCAB, (2, length))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


@dataclass(frozen=True)
class Case:
    """A model, its inputs, how many of its layers follow each other, whether its head is tied."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]] = _tokens
    layers: int = LAYERS
    tied_head: bool = False


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, num_key_value_heads=2))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=64))


def _gemma3() -> nn.Module:
    config = hf.Gemma3TextConfig(**COMMON, num_key_value_heads=2, head_dim=64)
    return hf.Gemma3ForCausalLM(config)


def _opt() -> nn.Module:
    config = hf.OPTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        ffn_dim=256,
        vocab_size=VOCAB,
        word_embed_proj_dim=WIDTH,
    )
    return hf.OPTForCausalLM(config)


def _gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = hf.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, **ends)
    return hf.GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 32, "d_ff": 256, "num_heads": 4, "vocab_size": VOCAB}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, num_layers=LAYERS))


def _vit() -> nn.Module:
    sizes = {key: value for key, value in COMMON.items() if key != "vocab_size"}
    return hf.ViTModel(hf.ViTConfig(**sizes, image_size=32, patch_size=8))


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        vocab_size=VOCAB,
        max_source_positions=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config)


def _pair() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(5)}


def _speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": _ids(5)}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


CASES = {
    "opt": Case(_opt, tied_head=True),
    "llama": Case(_llama),
    "qwen3": Case(_qwen3),
    "gemma3": Case(_gemma3, tied_head=True),
    "gpt2": Case(_gpt2, tied_head=True),
    "phi": Case(lambda: hf.PhiForCausalLM(hf.PhiConfig(**COMMON))),
    "phi3": Case(lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**COMMON, pad_token_id=0))),
    "bert": Case(lambda: hf.BertModel(hf.BertConfig(**COMMON))),
    "t5": Case(_t5, _pair, 3 * LAYERS, tied_head=True),
    "vit": Case(_vit, _image),
    "whisper": Case(_whisper, _speech, 3 * LAYERS, tied_head=True),
}


def _run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first tensor of the output: logits, or hidden states where there is no head."""
    with torch.no_grad():
        output = model(**inputs)
    return next(value for value in output.to_tuple() if isinstance(value, Tensor))


def _build(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    case = CASES[name]
    torch.manual_seed(0)
    model = frozen(case.make())
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at zero, where nobody would miss them
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs().items()}
    return model, inputs


def _matrices(model: nn.Module) -> dict[Tensor, int]:
    """Every weight that a linear layer of the model multiplies by, with its number of elements."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    return {layer.weight: layer.weight.numel() for layer in layers}


def _assert_nothing_forgotten(model: nn.Module) -> None:
    """Quantised: each linear layer's weight of at least min_elements. Kept: with a reason each."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    smallest = FineQuantConfig().min_elements
    expected = {w for w, elements in _matrices(model).items() if elements >= smallest}
    found = [parameters[site.name] for site in report().sites if site.status == "quantized"]
    assert len(found) == len(set(found))
    assert set(found) == expected
    for site in report().plan.kept:
        assert site.reason, site.name
        if parameters[site.name] in _matrices(model):
            assert "min_elements" in site.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_model_equals_its_fake_quantised_self(name: str, dtype: torch.dtype) -> None:
    _compare(name, dtype)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_model_in_fp16(name: str) -> None:
    _compare(name, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_model_through_inductor(name: str) -> None:
    _compare(name, torch.float32, inner_backend="inductor")


def _compare(name: str, dtype: torch.dtype, **options: Any) -> None:
    model, inputs = _build(name, dtype)
    before = model.get_input_embeddings().weight.clone() if CASES[name].tied_head else None
    actual = _run(finequant(model, **options), inputs)
    expected = _run(oracle(model), inputs)
    assert_close(actual, expected, depth=CHAIN * CASES[name].layers)
    # int4 leaves an error of about a tenth in each weight: far more than any rounding.
    original = _run(model, inputs)
    assert (actual - original).float().norm() > 0.03 * original.float().norm()
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
    model, inputs = _build("llama", torch.float32)
    overrides = {r"layers\.0\.mlp": {"bits": 8}, r"down_proj": {"granularity": 64}}
    _run(finequant(model, overrides=overrides, exclude=[r"o_proj"]), inputs)
    plan = report().plan
    assert plan.site("model.layers.0.mlp.down_proj.weight").bits == 8
    assert plan.site("model.layers.1.mlp.down_proj.weight").group_size == 64
    assert plan.site("model.layers.1.mlp.up_proj.weight").bits == 4
    assert not any("o_proj" in name for name in quantized_names(plan.sites))
    reason = plan.site("model.layers.0.self_attn.o_proj.weight").reason
    assert reason == "name matches exclude pattern 'o_proj'"


@pytest.mark.parametrize("inner_backend", ["eager", "inductor"])
def test_every_matmul_form_equals_its_fake_quantised_self(inner_backend: str) -> None:
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
