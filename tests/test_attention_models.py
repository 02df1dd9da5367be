"""Whole models of Hugging Face decode by the attention kernel: the tokens of the eager model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from fqcompile.kernels.cpu import attention, stream
from fqcompile.native import library as native_library
from tests.dense_models import COMMON, VOCAB, ids
from tests.helpers import frozen
from tests.native.paths import NAMES, library

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

SHARED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
TOKENS, LAYERS = 5, 2
# What transformers has no other form of, or refuses.
EAGER_ONLY = ("bloom", "gemma2", "gpt_oss", "mpt")


def _gemma2() -> nn.Module:
    config = hf.Gemma2Config(**SHARED, head_dim=32, attn_logit_softcapping=5.0, sliding_window=6)
    return hf.Gemma2ForCausalLM(config)


def _gemma3() -> nn.Module:
    sizes = {**COMMON, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 6}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes))


def _bloom() -> nn.Module:
    config = hf.BloomConfig(hidden_size=128, n_layer=LAYERS, n_head=4, vocab_size=VOCAB)
    return hf.BloomForCausalLM(config)


def _falcon(alibi: bool) -> nn.Module:
    sizes = {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = hf.FalconConfig(**sizes, vocab_size=VOCAB, alibi=alibi, multi_query=not alibi)
    return hf.FalconForCausalLM(config)


def _gpt_oss() -> nn.Module:
    sizes = {**SHARED, "head_dim": 32, "sliding_window": 6, "num_local_experts": 4}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, pad_token_id=0))
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    return model


def _mpt() -> nn.Module:
    sizes = {"d_model": 128, "n_heads": 4, "n_layers": LAYERS, "use_cache": True}
    config = hf.MptConfig(**sizes, vocab_size=VOCAB)
    return hf.MptForCausalLM(config)


def _gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = hf.GPT2Config(n_embd=128, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, **ends)
    return hf.GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": LAYERS, "num_heads": 4}
    config = hf.T5Config(**sizes, vocab_size=VOCAB, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config)


def _opt() -> nn.Module:
    sizes = {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    more = {"ffn_dim": 256, "vocab_size": VOCAB, "word_embed_proj_dim": 128}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, **more))


def _mixtral() -> nn.Module:
    config = hf.MixtralConfig(**SHARED, num_local_experts=4, pad_token_id=0)
    return hf.MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bloom": _bloom,
    "falcon": lambda: _falcon(False),
    "falcon with alibi": lambda: _falcon(True),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SHARED)),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
    "mpt": _mpt,
    "opt": _opt,
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SHARED)),
    "t5": _t5,
}
# Its decoder begins with one row, and attends to the encoder, too.
CALLS = {"t5": TOKENS * 2 * LAYERS}


def generate(model: Any, cache: str) -> list[int]:
    torch.manual_seed(1)
    tokens = ids(11)
    seen = torch.ones_like(tokens)
    seen[1, :3] = 0  # padded on the left
    with torch.no_grad():
        found = model.generate(
            tokens,
            attention_mask=seen,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )
    return found.flatten().tolist()


@pytest.mark.few(4)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_those_of_the_eager_model(
    name: str, form: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_form = name in EAGER_ONLY and form == "sdpa"
    if no_form or (cache == "static" and name in ("falcon with alibi", "mpt")):
        pytest.skip("transformers refuses it, or breaks the graph between scores and softmax")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = frozen(MODELS[name]())
    model.set_attn_implementation(form)
    expected = generate(model, cache)
    calls: list[bytes] = []
    found = library(NAMES[0])

    def counted(fields: bytes) -> None:
        calls.append(fields)
        found.attention(fields)

    counting = replace(found, attention=counted)
    monkeypatch.setattr(native_library, "loaded", lambda: counting)
    monkeypatch.setattr(attention, "serve", lambda library: None)  # Python is called, and counts
    stream.serve(None)
    options = {"min_elements": 1 << 40, "inner_backend": "eager"}  # weights stay as they are
    model.forward = torch.compile(model.forward, backend="finequant", options=options)
    assert generate(model, cache) == expected
    # and none for the prompt, of 11 rows
    assert len(calls) == CALLS.get(name, (TOKENS - 1) * LAYERS)
