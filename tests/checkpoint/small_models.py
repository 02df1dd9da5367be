"""A small model of our own, quantized; with a config, ties, and tensors that no state dict has."""

import json
from typing import Any

import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.weights.parameter import PackedWeight


class Config:
    """As much of a Hugging Face config as is asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def to_json_string(self) -> str:
        return json.dumps({"seed": self.seed})


class Small(nn.Module):
    """Embedding, tied head, two linears; a buffer of each kind and an attribute."""

    def __init__(self, seed: int = 0, width: int = 64) -> None:
        super().__init__()
        self.config = Config(seed)
        self.embed = nn.Embedding(20, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("angles", torch.randn(3), persistent=False)
        self.mask = torch.ones(width, dtype=torch.bool)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.down(torch.relu(self.up(self.embed(ids)))) * self.mask * self.angles.sum()
        y: Tensor = self.head(x) + self.steps
        return y


def small(seed: int = 0) -> Any:
    """Quantized; every value depends on the seed."""
    torch.manual_seed(seed)
    model = Small(seed).eval().requires_grad_(False)
    fqcompile.quantize_(model, min_elements=4096)
    return model


def contents(model: nn.Module) -> dict[str, Any]:
    """Everything that a save must keep, as bytes by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    tensors |= {name: t for name, t in vars(model).items() if isinstance(t, Tensor)}
    return {name: _content(tensor) for name, tensor in tensors.items()}


def _content(tensor: Tensor) -> Any:
    if isinstance(tensor, PackedWeight):
        plain = tensor.quantized()
        return (tensor.format, tensor.dtype, _content(plain.qweight), _content(plain.scale))
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return (tensor.dtype, tuple(tensor.shape), data)
