"""The architectures of the tables beside this file, as small frozen models with their inputs."""

import importlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_HERE = Path(__file__).parent
_SMALLEST_ID = 3  # below it lie the ids that begin, end and pad
_VOCAB = 128


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((_HERE / f"{name}.toml").read_text(encoding="utf-8"))


BASES = _table("bases")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model, what it takes, and what is known of it.

    Attributes:
        name: in the table.
        cls: the name of its class, in the package.
        sizes: of its config or constructor, over those of the tables of `bases` in `base`, less
            those in `without`.
        inputs: by name ["normal" or "ids", dimensions], "batch" among them; or a value.
        depth: how many layers follow each other.
        grouped: its experts have implementations to choose from.
        looped: experts run in a loop over data, and other batches choose others.
        tables: parameters that are a table and a linear's matrix at once, which has no place for
            dequantized values: excluded where results are compared with those.
        kept: by a part of a parameter's name, a part of the only reason for which a linear so
            named may stay as it is though the model reads it.
    """

    name: str
    cls: str
    package: str = "transformers"
    base: tuple[str, ...] = ("common",)
    without: tuple[str, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=lambda: {"input_ids": ["ids", "batch", 8]})
    depth: int = 2
    grouped: bool = False
    looped: bool = False
    tables: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Frozen, with values that somebody would miss where its class leaves zeros or nothing."""
        torch.manual_seed(0)
        model = self._make().eval().requires_grad_(False)
        for parameter in model.parameters():
            left = bool(parameter.any()) and bool(parameter.isfinite().all())
            if not left or (parameter.dim() == 3 and float(parameter.abs().max()) > 10):
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1)
        return model.to(dtype)

    def _make(self) -> nn.Module:
        cls = getattr(importlib.import_module(self.package), self.cls)
        sizes = _merged({"base": self.base, **self.sizes})
        sizes = {key: value for key, value in sizes.items() if key not in self.without}
        config = getattr(cls, "config_class", None)
        model: nn.Module = cls(**sizes) if config is None else cls(config(**sizes))
        if self.grouped:
            model.set_experts_implementation("grouped_mm")
        return model

    def batch(self, size: int, dtype: torch.dtype) -> dict[str, Any]:
        """Inputs of that many rows; the same whenever they are asked for."""
        torch.manual_seed(size)
        return {name: _input(value, size, dtype) for name, value in self.inputs.items()}


def _merged(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes over those of the tables that they name as `base`, at every level."""
    merged: dict[str, Any] = {}
    for base in sizes.get("base", ()):
        merged |= _merged(BASES[base])
    own = {key: value for key, value in sizes.items() if key != "base"}
    return merged | {k: _merged(v) if isinstance(v, dict) else v for k, v in own.items()}


def _input(value: Any, batch: int, dtype: torch.dtype) -> Any:
    if not isinstance(value, list):
        return value
    kind, *shape = value
    sizes = [batch if dim == "batch" else dim for dim in shape]
    if kind == "ids":
        return torch.randint(_SMALLEST_ID, _VOCAB, sizes)
    return torch.randn(sizes).to(dtype)


def tensors(output: object) -> Iterator[Tensor]:
    """Every floating point tensor of a model's output, in order; states and caches left out."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from tensors(tuple(output.values()))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def _architectures() -> Iterator[Architecture]:
    for table in "decoders encoders experts images sound libraries".split():
        for name, facts in _table(table).items():
            known = {"cls" if key == "class" else key: value for key, value in facts.items()}
            yield Architecture(name=name, **known)


ARCHITECTURES = {architecture.name: architecture for architecture in _architectures()}
