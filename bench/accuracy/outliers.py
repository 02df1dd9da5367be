"""The same function with outliers in its weights.

A channel between two operations is made small by the one that writes it and large by the weights
that read it, so nothing changes but how hard the reading weights are to quantize:

    norm gain [k] * s      columns k of the weights behind it / s
    v_proj rows * s        columns of o_proj / s
    up_proj, fc1 rows * s  columns of down_proj, fc2 / s      (linear, and ReLU for s > 0)

Each row of a reading weight gets weights 1 / s times as large as the others, as OPT and Llama have
them in the channels whose activations are small.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SHARE = 256  # one channel in so many


def with_outliers(model: nn.Module, shrink: float = 1 / 32, seed: int = 0) -> nn.Module:
    """A copy of a Hugging Face OPT, Llama or Mixtral that is the same in exact arithmetic.

    Raises:
        ValueError: `shrink` is not positive, or the model has no decoder layers of these families.
    """
    if not shrink > 0:
        raise ValueError(f"shrink {shrink}: a positive factor keeps what ReLU does")
    changed = copy.deepcopy(model)
    inner: Any = getattr(changed, "model", None)
    layers = getattr(getattr(inner, "decoder", inner), "layers", ())
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers; give an OPT, Llama or Mixtral for "
            "causal language modeling"
        )
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        change = _opt if hasattr(layer, "fc1") else _llama
        with torch.no_grad():
            _attention(layer.self_attn, shrink, generator)
            change(layer, shrink, generator)
    return changed


def _channels(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[: max(1, count // _SHARE)]


def _move(
    written: Sequence[Tensor | None], read: Sequence[Tensor], channels: Tensor, shrink: float
) -> None:
    """Entries or rows of what is written become small, columns [..., k] of what is read large."""
    for tensor in written:
        if tensor is not None:
            tensor[channels] *= shrink
    for weight in read:
        weight[..., channels] /= shrink


def _norm(norm: Any, read: Sequence[Tensor], shrink: float, generator: torch.Generator) -> None:
    channels = _channels(len(norm.weight), generator)
    _move([norm.weight, getattr(norm, "bias", None)], read, channels, shrink)


def _attention(attention: Any, shrink: float, generator: torch.Generator) -> None:
    """A value channel is read once by each query head that shares its key-value head."""
    v, out = attention.v_proj, getattr(attention, "o_proj", None) or attention.out_proj
    groups = out.weight.shape[1] // v.weight.shape[0]
    head = attention.head_dim
    channels = _channels(v.weight.shape[0], generator)
    _move([v.weight, v.bias], (), channels, shrink)
    kv_head, inside = channels // head, channels % head
    readers = (kv_head[:, None] * groups + torch.arange(groups)) * head + inside[:, None]
    _move((), [out.weight], readers.flatten(), shrink)


def _opt(layer: Any, shrink: float, generator: torch.Generator) -> None:
    attention = layer.self_attn
    qkv = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
    _norm(layer.self_attn_layer_norm, qkv, shrink, generator)
    _norm(layer.final_layer_norm, [layer.fc1.weight], shrink, generator)
    channels = _channels(layer.fc1.out_features, generator)
    _move([layer.fc1.weight, layer.fc1.bias], [layer.fc2.weight], channels, shrink)


def _llama(layer: Any, shrink: float, generator: torch.Generator) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
    _norm(layer.input_layernorm, qkv, shrink, generator)
    if not hasattr(mlp, "experts"):
        read = [mlp.gate_proj.weight, mlp.up_proj.weight]
        _norm(layer.post_attention_layernorm, read, shrink, generator)
        channels = _channels(mlp.up_proj.out_features, generator)
        _move([mlp.up_proj.weight], [mlp.down_proj.weight], channels, shrink)
        return
    gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    _norm(layer.post_attention_layernorm, [mlp.gate.weight, gate_up], shrink, generator)
    for expert in range(len(down)):
        channels = _channels(down.shape[-1], generator)
        _move([gate_up[expert][down.shape[-1] :]], [down[expert]], channels, shrink)
