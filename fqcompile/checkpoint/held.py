"""Weights of a checkpoint that are in its model only while a part of the model needs them.

model on the meta device  ->  tensors of one block are read, converted, assigned  ->  meta again
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fqcompile.checkpoint.conversion import target_types
from fqcompile.checkpoint.model import CheckpointModel, Slot, slots
from fqcompile.modules.blocks import parts


class HeldWeights:
    """A context for each module of the model; what lies outside of its parts is there from now on.

    Raises:
        CheckpointError: a tensor has another shape in the checkpoint than in the model.
    """

    def __init__(self, work: CheckpointModel) -> None:
        self._work, self._types = work, target_types(work.computed, work.dtype)
        self._steps = {target: step for step in work.steps for target in step.targets}
        self._slots: dict[nn.Module, list[Slot]] = {}
        self._names: dict[int, str] = {}  # of the given tensors, by that in the model
        for slot in slots(work.computed):
            if slot.tensor.is_meta:
                self._slots.setdefault(slot.module, []).append(slot)
                if slot.name in self._steps:
                    self._names.setdefault(id(slot.tensor), slot.name)
        inside = {module for _, part in parts(work.model) for module in part.modules()}
        self._put(slot for m, own in self._slots.items() if m not in inside for slot in own)

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[None]:
        """The parameters and buffers of the module and of those in it are there."""
        own = [slot for part in module.modules() for slot in self._slots.get(part, ())]
        try:
            self._put(own)
            yield
        finally:
            for slot in own:
                slot.put(slot.tensor)

    def _put(self, own: Iterable[Slot]) -> None:
        values: dict[int, Tensor] = {}
        for slot in own:
            name = self._names.get(id(slot.tensor))
            if name is None:  # a checkpoint may lack it, if the model does not read it
                continue
            if id(slot.tensor) not in values:
                values |= self._converted(name)
            slot.check_shape(values[id(slot.tensor)])
            slot.put(values[id(slot.tensor)])

    def _converted(self, name: str) -> dict[int, Tensor]:
        """What the step for this name makes, by the tensors in whose places it belongs."""
        step = self._steps[name]
        made = self._work.convert(step, self._types(step.target))
        places = {name: identity for identity, name in self._names.items()}
        return {
            places[name]: nn.Parameter(value, requires_grad=False)
            for name, value in made.items()
            if name in places
        }
