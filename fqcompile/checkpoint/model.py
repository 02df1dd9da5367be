"""The model of a checkpoint: the slots in which it keeps tensors, and how it is built without any.

Slots are parameters, buffers (persistent or not) and plain attributes. Buffers that are in no state
dict, such as rotary frequencies, count too: a model on the meta device has no values for them. A
directory must fill all slots. `CheckpointModel` is the class that a config names, on the meta
device, and the conversion of a checkpoint's tensors to its own.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqcompile.checkpoint.conversion import Conversion, conversions, initialize
from fqcompile.checkpoint.hugging_face import build_model, model_made_by
from fqcompile.checkpoint.manifest import Manifest
from fqcompile.checkpoint.source import Source
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import DTYPES, read_tensor
from fqcompile.hf_compat import ignored_names, is_model_class, untied_names

_WRAPPER = "_orig_mod"  # the name that torch.compile's wrapper gives to what it wraps
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Slot:
    """One place. `name` is the qualified one in the model before it was wrapped for compilation."""

    name: str
    kind: str
    module: nn.Module
    attribute: str
    tensor: Tensor

    def check_shape(self, value: Tensor) -> None:
        """Whether a checkpoint's tensor fits here.

        Raises:
            CheckpointError: it has another shape than the model's.
        """
        if value.shape != self.tensor.shape:
            raise CheckpointError(
                f"{self.name} is {list(value.shape)} in the checkpoint and "
                f"{list(self.tensor.shape)} in the model; is config.json that of another model?"
            )

    def put(self, value: Tensor) -> None:
        """Assign `value` to the slot of the module."""
        if self.kind == "parameter":
            self.module._parameters[self.attribute] = value  # type: ignore[assignment]
        elif self.kind == "buffer":
            self.module._buffers[self.attribute] = value
        else:
            setattr(self.module, self.attribute, value)


def slots(model: nn.Module) -> Iterator[Slot]:
    """All slots of a model, under each of their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        path = [part for part in prefix.split(".") if part and part != _WRAPPER]
        for kind, tensors in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        ):
            for attribute, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    name = ".".join([*path, attribute])
                    yield Slot(name, kind, module, attribute, tensor)


def check_fits(
    manifest: Manifest, places: Mapping[str, Slot], model: nn.Module, directory: Path
) -> None:
    """Check that each slot of the model has a value of its shape, and each value a slot.

    Raises:
        CheckpointError: otherwise; the message names the first few of each kind.
    """
    missing = [n for n, slot in places.items() if n not in manifest.slots and _needs_value(slot)]
    unexpected = [
        n for n in manifest.slots if n not in places and not _makes_room(manifest, n, model)
    ]
    different = [
        text for n, slot in places.items() if n in manifest.slots
        for text in _differences(manifest, n, slot)
    ]  # fmt: skip
    kinds = {
        "the model has no place for": unexpected,
        "the directory has no value for": missing,
        "these differ:": different,
    }
    parts = [f"{what} {shortened(names)}" for what, names in kinds.items() if names]
    if parts:
        raise CheckpointError(
            f"{directory} holds a {manifest.model.get('class')} that is not this "
            f"{type(model).__name__}: {'; '.join(parts)}; build the model with the configuration "
            "that was saved"
        )


def put(model: nn.Module, slot: Slot | None, name: str, value: Tensor) -> None:
    """Assign `value` to its slot, or to an attribute that the model does not have yet."""
    if slot is not None:
        slot.put(value)
    else:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value)


def _needs_value(slot: Slot) -> bool:
    """Whether a file must provide it: plain attributes may be constants, but not on meta."""
    return slot.kind != "attribute" or slot.tensor.is_meta


def _makes_room(manifest: Manifest, name: str, model: nn.Module) -> bool:
    """Whether it is a plain attribute whose module exists, so that it can be created."""
    if manifest.slots[name].kind != "attribute":
        return False
    path = name.rpartition(".")[0]
    return path in dict(model.named_modules(remove_duplicate=False))


def _differences(manifest: Manifest, name: str, slot: Slot) -> list[str]:
    record = manifest.slots[name]
    shape = manifest.shape_of(record.value)
    if record.kind != slot.kind:
        return [f"{name} is a {record.kind} in the directory and a {slot.kind} in the model"]
    if shape != tuple(slot.tensor.shape):
        return [f"{name} is {list(shape)} and {list(slot.tensor.shape)} in the model"]
    return []


def shortened(names: Sequence[str]) -> str:
    """The first few, and how many there are besides."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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
    def of(
        cls, source: Source, dtype: torch.dtype | None, given: Callable[[], Any] | None = None
    ) -> "CheckpointModel":
        """Build the model without reading a tensor; by a function of the caller if one is given.

        Raises:
            CheckpointError: the class is unknown, or needs tensors that the checkpoint lacks.
        """
        names = source.config.get("architectures")
        names = [names] if isinstance(names, str) else names
        name = names[0] if isinstance(names, list) and names else None
        dtype = dtype or _dtype(source)
        with torch.device("meta"):
            tensors = len(source.tensors)
            model = (
                build_model(name, source.config, source.directory, tensors, dtype)
                if given is None
                else model_made_by(given, source.directory, dtype)
            )
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

    @cached_property
    def computed(self) -> Any:
        """The model, with the tensors that it computes itself, such as rotary frequencies."""
        initialize(self.model, self.missing, self.source.directory)
        return self.model

    def convert(self, step: Conversion, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's tensors that a step produces, in that dtype.

        Raises:
            CheckpointError: the checkpoint's tensors have shapes that cannot be converted.
        """
        places = self.source.tensors
        return step.run(self.model, lambda name: read_tensor(places[name]).to(dtype))


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


def named_alone(model: Any, found: Iterable[Slot]) -> set[str]:
    """Further names of shared parameters, of which `from_pretrained` wants a tensor each."""
    parameters = ((slot.name, slot.tensor) for slot in found if slot.kind == "parameter")
    return untied_names(model, parameters) if is_model_class(type(model)) else set()
