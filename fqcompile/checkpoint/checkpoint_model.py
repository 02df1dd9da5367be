"""A checkpoint's model on the meta device, and the conversion of the checkpoint's tensors to it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fqcompile.checkpoint.conversion import Conversion, conversions
from fqcompile.checkpoint.hugging_face import build_model, hugging_face_files
from fqcompile.checkpoint.slots import shortened, slots
from fqcompile.checkpoint.source import Source
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import DTYPES, read_tensor
from fqcompile.hf_compat import ignored_names


@dataclass(frozen=True)
class CheckpointModel:
    """The class that the config names, on the meta device.

    Attributes:
        steps: conversions from tensors of the checkpoint to tensors of the model.
        unused: tensors of the checkpoint that the model unexpectedly does not use.
        missing: tensors of the model that the checkpoint may omit, and does.
    """

    source: Source
    model: Any
    dtype: torch.dtype
    steps: tuple[Conversion, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, source: Source, dtype: torch.dtype | None) -> "CheckpointModel":
        """Build the model without reading a tensor.

        Raises:
            CheckpointError: the class is unknown, or needs tensors that the checkpoint lacks.
        """
        names = source.config.get("architectures")
        names = [names] if isinstance(names, str) else names
        name = names[0] if isinstance(names, list) and names else None
        dtype = dtype or _dtype(source)
        with torch.device("meta"):
            tensors = len(source.tensors)
            model = build_model(name, source.config, source.directory, tensors, dtype)
        steps, unknown = conversions(model, source.tensors)
        may_lack, may_ignore = ignored_names(model)
        unused = [n for n in unknown if not _matches(may_ignore, n)]
        missing = _missing(model, [name for step in steps for name in step.targets])
        lost = [n for n in missing if not _matches(may_lack, n)]
        if lost:
            raise CheckpointError(
                f"{source.directory} lacks {len(lost)} tensors of {name}: "
                f"{shortened(lost)}; is config.json that of another model?"
            )
        return cls(source, model.eval(), dtype, tuple(steps), tuple(unused), tuple(missing))

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @cached_property
    def given(self) -> tuple[str, ...]:
        """The names in the model for which the checkpoint has a value."""
        return tuple(name for step in self.steps for name in step.targets)

    def convert(self, step: Conversion, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's tensors that a step produces, in that dtype.

        Raises:
            CheckpointError: the checkpoint's tensors have shapes that cannot be converted.
        """
        places = self.source.tensors
        return step.run(self.model, lambda name: read_tensor(places[name]).to(dtype))

    @property
    def config_file(self) -> bytes:
        """The model's `config.json`, with the dtype of this model."""
        return hugging_face_files(self.model)["config.json"]


def _dtype(source: Source) -> torch.dtype:
    """The dtype, as `from_pretrained` decides: the config's, else the first floating-point one."""
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
        found: torch.dtype = getattr(torch, named)
        return found
    types = (DTYPES[place.dtype] for place in source.tensors.values())
    return next((t for t in types if t.is_floating_point), torch.float32)


def _missing(model: Any, given: Sequence[str]) -> list[str]:
    """Names without a value, whose tied names have no value either."""
    tensors = {slot.name: id(slot.tensor) for slot in slots(model)}
    there = {tensors[name] for name in given if name in tensors}
    return [name for name in model.state_dict() if tensors[name] not in there]


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
