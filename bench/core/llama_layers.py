"""A few layers of a Llama with the head and its embedding, made in seconds: for whole starts."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Size:
    """Of Llama 3 8B, but for the number of layers and the vocabulary."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 2
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000


SIZES = {"llama": Size(), "tiny": Size(256, 512, 2, 4, 2, 1024)}


def config_of(size: Size) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=512,
    )


def on_meta(size: Size) -> nn.Module:
    """The model without any weights, frozen."""
    with torch.device("meta"):
        return LlamaForCausalLM(config_of(size)).bfloat16().eval().requires_grad_(False)


@torch.no_grad()
def build(size: Size) -> nn.Module:
    """In bf16, with the same weights each time, no two matrices alike, and values that keep their
    size from layer to layer."""
    model = on_meta(size)
    model.to_empty(device="cpu")
    _restore_buffers(model, size)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    for number, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1)
            continue
        scaled = block * (parameter.shape[-1] ** -0.5 * (1 + number / 64))
        _tile(parameter, scaled.bfloat16(), 997 * number)
    return model


def _restore_buffers(model: nn.Module, size: Size) -> None:
    """Those of the rotary embedding, which are computed and have no values on meta."""
    rotary = model.get_submodule("model.rotary_emb")
    fresh = type(rotary)(config_of(size))
    for name, buffer in fresh.named_buffers():
        setattr(rotary, name, buffer)


def _tile(parameter: Tensor, block: Tensor, start: int) -> None:
    flat, block = parameter.view(-1), block.roll(start)
    for begin in range(0, len(flat), len(block)):
        piece = flat[begin : begin + len(block)]
        piece.copy_(block[: len(piece)])


def prompt(size: Size, tokens: int = 16) -> Tensor:
    return torch.arange(tokens)[None] % size.vocab
