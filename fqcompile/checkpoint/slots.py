"""Slots: the places where a model keeps tensors, and the check that a directory fills all of them.

Slots are parameters, buffers (persistent or not) and plain attributes. Buffers that are in no state
dict, such as rotary frequencies, count too: a model on the meta device has no values for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fqcompile.checkpoint.manifest import Manifest
from fqcompile.errors import CheckpointError

_WRAPPER = "_orig_mod"  # the name that torch.compile's wrapper gives to what it wraps


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


_SHOWN = 5


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
