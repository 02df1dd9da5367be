"""What is asked of export: its arguments, checked, and the kind of its source."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from fqcompile.checkpoint.data import data_of, without_data
from fqcompile.checkpoint.manifest import MANIFEST, read_manifest, versions
from fqcompile.checkpoint.packed_record import METHOD
from fqcompile.checkpoint.source import Source, open_source, read_config, read_tensors
from fqcompile.config import HEAD_NAMES, FineQuantConfig, packing_config
from fqcompile.errors import OptionError
from fqcompile.tensor.format import NORMAL, UNIFORM

# The engines that must be able to load the output of each profile.
PROFILES: dict[str, tuple[str, ...]] = {
    "portable": ("vllm", "sglang", "transformers"),
    "serve": ("vllm", "sglang"),
}
FORMATS = ("compressed-tensors",)


@dataclass(frozen=True)
class Request:
    """The arguments of `export`.

    Raises:
        OptionError: one is not allowed, such as a quantization option for a quantized source.
    """

    source: Path
    to: str
    profile: str
    tp: int
    dtype: torch.dtype | None
    options: Mapping[str, object]

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise OptionError(f"to is {self.to!r}; allowed: {', '.join(map(repr, FORMATS))}")
        if self.profile not in PROFILES:
            allowed = (f"{name!r} (for {', '.join(loads)})" for name, loads in PROFILES.items())
            raise OptionError(f"profile is {self.profile!r}; allowed: {', '.join(allowed)}")
        if type(self.tp) is not int or self.tp < 1:
            raise OptionError(f"tp is {self.tp!r}; allowed: an int >= 1")
        given = [name for name in self.options if name != "on_unsupported"]
        given += ["dtype"] if self.dtype is not None else []
        if given and (self.is_saved or self.is_packed):
            raise OptionError(
                f"option {given[0]} is one of quantizing, and {self.source} is quantized already; "
                "leave it out, or export the checkpoint that it was made from"
            )
        if self.config.quantize_embeddings is not None:
            message = "option quantize_embeddings is 8, and engines keep tables dense: drop it"
            raise OptionError(message)
        asked = (self.options, *self.config.overrides.values())
        if any(options.get("levels") == NORMAL for options in asked):
            raise OptionError(
                f"option levels is {NORMAL!r}, and {self.to} has uniform levels alone: drop it"
            )

    @property
    def is_saved(self) -> bool:
        """Whether `fqcompile.save` or `fqcompile quantize` wrote the source."""
        return (self.source / MANIFEST).is_file()

    @cached_property
    def is_packed(self) -> bool:
        """Whether `save_pretrained` wrote it, with packed weights."""
        if self.is_saved or not (self.source / "config.json").is_file():
            return False
        found = read_config(self.source).get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == METHOD

    @cached_property
    def config(self) -> FineQuantConfig:
        return packing_config(without_data(self.options))

    @property
    def quantizing(self) -> dict[str, object]:
        """The options, with the levels that the format has, and with output heads excluded: they
        are written dense anyway."""
        exclude = [*self.config.exclude, HEAD_NAMES.pattern]
        return {**self.options, "levels": UNIFORM, "exclude": exclude}

    def identity(self) -> str:
        """A value that is equal for exports with equal output.

        Raises:
            CheckpointError: the source cannot be exported.
        """
        content = [
            str(self.source.resolve()),
            self._version(),
            [self.to, self.profile, self.tp, str(self.dtype)],
            [self.config.as_dict(), versions(), str(data_of(self.source, **self.options))],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _version(self) -> object:
        """A value that changes when the source does."""
        if self.is_saved:
            return read_manifest(self.source).generation
        if self.is_packed:
            return Source(self.source, read_config(self.source), read_tensors(self.source)).identity
        return open_source(self.source).identity
