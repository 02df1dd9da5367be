"""Decoders of well-known shapes with random weights, made on the device that they run on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A model's shape: `kind` is its name in transformers; `layers` is how many it has.

    timed: how many of them are timed unless asked otherwise, so that two copies fit one GPU.
    """

    kind: str
    layers: int
    timed: int
    sizes: Mapping[str, Any] = field(default_factory=dict)


def _llama(hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }


def _opt(hidden: int, heads: int, vocab: int = 50272) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "word_embed_proj_dim": hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }


MODELS = {
    "llama-3-8b": Shape("Llama", 32, 32, _llama(4096, 14336, 32, 8, 128256)),
    "opt-30b": Shape("OPT", 48, 8, _opt(7168, 56)),
    "opt-175b": Shape("OPT", 96, 4, _opt(12288, 96)),
    "small": Shape("Llama", 4, 4, _llama(1024, 2816, 16, 4, 32000)),
    "tiny": Shape("Llama", 4, 2, _llama(256, 512, 4, 2, 512)),
    "tiny-opt": Shape("OPT", 4, 2, _opt(256, 4, 512)),
}
MADE_UP = ("small", "tiny", "tiny-opt")  # no well-known models: measured where asked for


def classes(name: str) -> tuple[Any, Any]:
    """Those of its configuration and of the model, imported."""
    library, kind = import_module("transformers"), MODELS[name].kind
    return getattr(library, f"{kind}Config"), getattr(library, f"{kind}ForCausalLM")


def build(name: str, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with its first `layers` layers, frozen.

    A weight of K columns has a standard deviation of K**-1/2, as trained ones about have: values
    keep their size from layer to layer.
    """
    config_type, model_type = classes(name)
    config = config_type(**MODELS[name].sizes, num_hidden_layers=layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = model_type(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


def parameter_bytes(model: nn.Module) -> int:
    """Each parameter once, however many modules share it."""
    return sum(parameter.nbytes for parameter in model.parameters())
