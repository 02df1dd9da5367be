"""NodeWeight: the weight of a node, as a value that does not depend on the model instance.

Packed parameters are handled only here: their codes are used unchanged, and if the graph stacks
them, they become rows of the stack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fqcompile.errors import PlanDoesNotFit, UnquantizableWeight
from fqcompile.kernels.template import PLAIN, Layout
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.memory import Memory
from fqcompile.weights.parameter import PackedWeight
from fqcompile.weights.recipe import WeightRecipe

Tensors = tuple[Tensor, ...]


def part_key(recipe: WeightRecipe, plan: QuantPlan) -> tuple[object, ...]:
    """A key that is equal if the same sources give the same codes and scales."""
    return (recipe.key, *plan.choice, plan.asked)


@dataclass(frozen=True)
class Part:
    """One site's rows of a NodeWeight: its recipe, the inputs it reads, and how it is quantized.

    For a stack of experts, `rows` are those of one expert, and `experts` is their number; else 0.
    """

    recipe: WeightRecipe
    inputs: tuple[int, ...]
    plan: QuantPlan
    rows: int
    k: int
    experts: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """A key that is equal if the same sources give the same codes and scales."""
        return part_key(self.recipe, self.plan)

    def quantize(self, sources: tuple[Tensor, ...]) -> QuantizedTensor:
        """Quantize the matrix that the recipe makes of `sources`, by the plan.

        Raises:
            PlanDoesNotFit: the plan was made for other values, and these cannot be quantized or
                need scales of another dtype.
        """
        w = self.recipe(*sources)
        if isinstance(w, PackedWeight):
            return w.quantized()
        try:
            weight = quantize_weight(w, self.plan)
        except UnquantizableWeight as error:
            raise PlanDoesNotFit(str(error)) from error
        if weight.scale.dtype != self.plan.scale_dtype:
            raise PlanDoesNotFit(f"scales are {weight.scale.dtype}, not {self.plan.scale_dtype}")
        return weight


@dataclass(frozen=True)
class NodeWeight:
    """Parts stacked along the rows (of each expert) at one group size, in one layout.

    `interleaved`: rows of gate and up alternate, and are packed in the order that kernels read: all
    rows of gate, then all of up.
    """

    parts: tuple[Part, ...]
    group_size: int
    layout: Layout = PLAIN
    interleaved: bool = False

    @property
    def bits(self) -> int:
        return self.parts[0].plan.bits

    @property
    def levels(self) -> str:
        return self.parts[0].plan.levels

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def experts(self) -> int:
        """The number of matrices in the stack; 0 if the weight is one matrix."""
        return self.parts[0].experts

    @property
    def rows(self) -> int:
        """Rows of the matrix, or of each expert's."""
        return sum(part.rows for part in self.parts)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.parts[0].plan.scale_dtype

    @property
    def inputs(self) -> tuple[int, ...]:
        """The graph inputs that the parts read, in order."""
        return tuple(i for part in self.parts for i in part.inputs)

    @property
    def key(self) -> tuple[object, ...]:
        parts = tuple(part.key for part in self.parts)
        return (parts, self.experts, self.group_size, self.layout.name, self.interleaved)

    def part_sources(self, sources: Sequence[Tensor]) -> Iterator[tuple[Part, Tensors]]:
        """Each part with its own tensors, out of `sources`, the tensors at `inputs`."""
        start = 0
        for part in self.parts:
            stop = start + len(part.inputs)
            yield part, tuple(sources[start:stop])
            start = stop

    def stack(self, weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """The parts at one group size (repeating scales loses nothing), one above the other."""
        stacked = QuantizedTensor.cat([weight.regroup(self.group_size) for weight in weights])
        return stacked.gate_then_up() if self.interleaved else stacked

    def slices(self, stacked: QuantizedTensor) -> Iterator[QuantizedTensor | None]:
        """The parts as views of the stacked tensors; None for each if rows were reordered."""
        moved = self.interleaved or (self.experts and len(self.parts) > 1)
        for start, part in zip(self.starts, self.parts, strict=True):
            yield None if moved else stacked.narrow(start, part.rows)

    def recover(self, packed: QuantizedTensor, index: int) -> QuantizedTensor:
        """Part `index` as it was given to `stack`, bit for bit, recovered from the kernel's layout.

        The layout must have an `unpack_matrix`.
        """
        part, stacked = self.parts[index], self.layout.unpack(packed)
        if self.interleaved:
            stacked = stacked.gate_beside_up()
        own = stacked.narrow(self.starts[index], part.rows).coarsen(part.plan.group_size)
        # `cat` promoted the scales of all parts to one dtype; the cast back is exact.
        return replace(own, scale=own.scale.to(part.plan.scale_dtype))

    @property
    def starts(self) -> list[int]:
        """The first row of each part."""
        return [0, *accumulate(part.rows for part in self.parts[:-1])]


def common_group_size(specs: list[NodeWeight]) -> int | None:
    """The group size that all specs can share without loss, or None.

    A single scale per row can be repeated for groups of any size; groups of G for any divisor of G.
    """
    sizes = {spec.group_size for spec in specs if spec.group_size < spec.k}
    if not sizes:
        return specs[0].k
    finest = min(sizes)
    return finest if all(size % finest == 0 for size in sizes) else None


def any_packed(sources: Sequence[Tensor]) -> bool:
    """Whether some source is packed already, so that its codes need not be stored again."""
    return any(isinstance(source, PackedWeight) for source in sources)


def plan_of_packed(w: Tensor) -> QuantPlan | str:
    """The plan of a packed weight, or the reason why its codes cannot be used here.

    The plan has no error: that was known only when the weight was packed.
    """
    if not isinstance(w, PackedWeight) or w.format.transposed or w.ids is not None:
        return "the weight is packed, and is read here in a way that its codes cannot follow"
    form = w.format
    return QuantPlan.of(form, w.scale.dtype)


def packed_already(spec: NodeWeight, sources: Sequence[Tensor]) -> QuantizedTensor | None:
    """The codes of a packed weight themselves, if they are what `spec` asks for."""
    part = spec.parts[0]
    if len(spec.parts) > 1 or not any_packed(sources):
        return None
    w = part.recipe(*sources)
    assert isinstance(w, PackedWeight), "checked when it was planned"
    as_asked = (spec.layout.name, spec.group_size, False)
    as_it_is = (w.format.layout, w.format.group_size, spec.interleaved)
    return w.packed if as_it_is == as_asked else None


def share_memory(spec: NodeWeight, packed: QuantizedTensor, sources: Sequence[Tensor]) -> None:
    """Make packed weights that were stacked views of rows of the stack, to free their own memory.

    This is not done if the stack has another layout or group size, if rows were reordered, or if a
    part does not consist of whole blocks of the layout.
    """
    if spec.experts or spec.interleaved or len(spec.parts) < 2:
        return
    as_asked = (spec.layout.name, spec.group_size, packed.scale.dtype)
    for start, (part, own) in zip(spec.starts, spec.part_sources(sources), strict=True):
        memory = own[0].memory if isinstance(own[0], PackedWeight) else None
        if isinstance(memory, Memory) and not part.recipe.steps:
            form, rows = memory.weight.format, spec.layout.narrow(packed, start, part.rows)
            as_it_is = (form.layout, form.group_size, memory.weight.scale.dtype)
            if rows is not None and as_it_is == as_asked:
                memory.weight = replace(rows, format=form)
