"""What is asked of an export, checked; and what makes two exports the same."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from fqcompile.checkpoint.manifest import MANIFEST, read_manifest
from fqcompile.checkpoint.source import open_source
from fqcompile.checkpoint.versions import versions
from fqcompile.config import HEAD_NAMES, FineQuantConfig
from fqcompile.errors import OptionError
from fqcompile.quantize_model import packing_config

# Which engines must load what a profile writes.
PROFILES: dict[str, tuple[str, ...]] = {
    "portable": ("vllm", "sglang", "transformers"),
    "serve": ("vllm", "sglang"),
}
FORMATS = ("compressed-tensors",)


@dataclass(frozen=True)
class Request:
    """The arguments of `export`.

    Raises:
        OptionError: one is not allowed; those of quantising are not for what is quantised already.
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
        if given and self.is_saved:
            raise OptionError(
                f"option {given[0]} is one of quantising, and {self.source} is quantised already; "
                "leave it out, or export the checkpoint that it was made from"
            )
        assert self.config

    @property
    def is_saved(self) -> bool:
        """Whether the source is quantised by fqcompile already."""
        return (self.source / MANIFEST).is_file()

    @cached_property
    def config(self) -> FineQuantConfig:
        return packing_config(self.options)

    @property
    def quantising(self) -> dict[str, object]:
        """The options, and heads left alone: written dense, rounding them would gain nothing."""
        return {**self.options, "exclude": [*self.config.exclude, HEAD_NAMES.pattern]}

    def identity(self) -> str:
        """Equal for exports that write the same.

        Raises:
            CheckpointError: the source is no directory to export.
        """
        source = read_manifest(self.source).generation if self.is_saved else None
        content = [
            str(self.source.resolve()),
            source or open_source(self.source).identity,
            [self.to, self.profile, self.tp, str(self.dtype)],
            [self.config.as_dict(), versions()],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
