"""NoMemory: a tensor whose values are in other tensors, and what it answers to who asks where."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import FineQuantError
from fqcompile.weights.packed_memory import Place

_LIFETIME = "_fqcompile_lifetime"  # attribute of a dense tensor


class Lifetime:
    """What lives as long as the values of a tensor, for weak references.

    A tensor that itself is referred to weakly cannot be exchanged, as `Module.to` does. Pickled,
    it is an empty container that every loader of PyTorch takes.
    """

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()


class NoMemory(Tensor):
    """A packed weight, or a view of one."""

    lifetime: Lifetime

    @property
    def place(self) -> Place:
        """In the weight that was packed."""
        return Place(self.size(), self.stride(), self.storage_offset())

    def untyped_storage(self) -> torch.UntypedStorage:
        """Whoever asks it for an address, as safetensors does, is told what to do."""
        storage = super().untyped_storage()
        if type(storage) is torch.UntypedStorage:
            storage.__class__ = _Storage
        return storage

    def seal(self) -> None:
        """Let what asks for the address in C, to write there, be told, and not be given zero."""
        torch._C._set_throw_on_mutable_data_ptr(self)

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise no_memory()

    __dlpack__ = apply_ = map_ = map2_ = storage = _typed_storage = _refuse


def lifetime(weight: Tensor) -> Lifetime:
    """What to refer to weakly for this weight: it goes with the values when they are exchanged."""
    if isinstance(weight, NoMemory):
        return weight.lifetime
    attributes = vars(weight)
    if type(attributes.get(_LIFETIME)) is not Lifetime:
        attributes.pop(_LIFETIME, None)  # of a pickled tensor
    found: Lifetime = attributes.setdefault(_LIFETIME, Lifetime())
    return found


class _Storage(torch.UntypedStorage):
    def data_ptr(self) -> int:
        raise no_memory()


def no_memory(name: str = "") -> FineQuantError:
    """What to raise where the memory of the parameter `name`, or of a view of it, is asked for."""
    return FineQuantError(
        f"a packed weight{f', {name},' if name else ''} has no memory of its own to be read or "
        "written as a dense one: save the model with fqcompile.save(model, directory), or "
        "torch.save its state_dict, or make it dense again by fqcompile.restore(model); of a view "
        "that is only read, take a copy by clone()"
    )
