"""Small models of Hugging Face's classes with random weights, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor, nn

from tests.helpers import frozen

VOCAB, WIDTH, LAYERS = 512, 128, 2
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": VOCAB,
    "initializer_range": WIDTH**-0.5,  # a linear layer keeps the size of its input
}


def ids(length: int = 7) -> Tensor:
    return torch.randint(0, VOCAB, (2, length))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": ids()}


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
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def _speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": ids(5)}


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


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first tensor of the output: logits, or hidden states where there is no head."""
    options: dict[str, Any] = {}
    if model.config.is_encoder_decoder and Version(torch.__version__) < Version("2.13"):
        options["use_cache"] = False  # made of a deepcopy, which Dynamo of PyTorch 2.11 refuses
    with torch.no_grad():
        output = model(**inputs, **options)
    return next(value for value in output.to_tuple() if isinstance(value, Tensor))


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    case = CASES[name]
    torch.manual_seed(0)
    model = frozen(case.make())
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at zero, where nobody would miss them
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs().items()}
    return model, inputs
