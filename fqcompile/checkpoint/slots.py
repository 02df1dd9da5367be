"""Where a model keeps tensors: parameters, buffers (persistent or not) and plain attributes.

Buffers that no state dict has, such as rotary frequencies, count too: a model that is built on the
meta device never computed them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

_WRAPPER = "_orig_mod"  # the name that torch.compile's wrapper gives to what it wraps


@dataclass(frozen=True, eq=False)
class Slot:
    """One place. `name` is the qualified one in the model before it was wrapped for compilation."""

    name: str
    kind: str
    module: nn.Module
    attribute: str
    tensor: Tensor

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
