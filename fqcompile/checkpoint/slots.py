"""Where a model keeps tensors, and whether a directory has one for each of these places.

Parameters, buffers (persistent or not) and plain attributes. Buffers that no state dict has, such
as rotary frequencies, count too: a model on the meta device never computed them.
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
        """`value` becomes what the module has there."""
        if self.kind == "parameter":
            self.module._parameters[self.attribute] = value  # type: ignore[assignment]
        elif self.kind == "buffer":
            self.module._buffers[self.attribute] = value
        else:
            setattr(self.module, self.attribute, value)


def slots(model: nn.Module) -> Iterator[Slot]:
    """All of them, by every name that they have."""
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
    """Each slot of the model has a value of its shape, and each value a slot.

    Raises:
        CheckpointError: not so; the message names the first few of each kind.
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
    """`value` to its place, which may be an attribute that the model did not have yet."""
    if slot is not None:
        slot.put(value)
    else:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value)


def _needs_value(slot: Slot) -> bool:
    """Plain attributes may be constants that the constructor made; but not on the meta device."""
    return slot.kind != "attribute" or slot.tensor.is_meta


def _makes_room(manifest: Manifest, name: str, model: nn.Module) -> bool:
    """A plain attribute can be made where its module is."""
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
