"""PackedSpec: the packed tensors that a node reads, as a value that any instance can fill."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqcompile.errors import PlanDoesNotFit, UnquantizableWeight
from fqcompile.kernels.template import PLAIN, Layout, PackedLinear, PackedTensors
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.tensor.quantized import QuantizedWeight
from fqcompile.weights.packed_memory import PackedMemory
from fqcompile.weights.packed_weight import PackedWeight
from fqcompile.weights.recipe import WeightRecipe
from fqcompile.weights.stacks import pack_stack, unpack_stack

Tensors = tuple[Tensor, ...]


def part_key(recipe: WeightRecipe, plan: QuantPlan) -> tuple[object, ...]:
    """Equal where the same sources give the same codes and scales."""
    return (recipe.key, plan.bits, plan.group_size, plan.scale_method, plan.scale_dtype)


@dataclass(frozen=True)
class PackedPart:
    """One site's share of the rows: its recipe, the inputs it reads, and how it is quantised.

    Of a stack of experts, `rows` are those of one, and `experts` is their number; else it is 0.
    """

    recipe: WeightRecipe
    inputs: tuple[int, ...]
    plan: QuantPlan
    rows: int
    k: int
    experts: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where the same sources give the same codes and scales."""
        return part_key(self.recipe, self.plan)

    def quantize(self, sources: tuple[Tensor, ...]) -> QuantizedWeight:
        """By the plan.

        Raises:
            PlanDoesNotFit: it was made for other values, which could be quantised, or whose scales
                took fewer bits.
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
class PackedSpec:
    """Parts stacked along the rows (of each expert) at one group size, in one layout.

    `interleaved`: gate and up are every other row, and are packed as the kernels want them: all
    rows of gate, then all of up.
    """

    parts: tuple[PackedPart, ...]
    group_size: int
    layout: Layout = PLAIN
    interleaved: bool = False

    @property
    def bits(self) -> int:
        return self.parts[0].plan.bits

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def experts(self) -> int:
        """Matrices in the stack; 0 where the weight is one matrix."""
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
        """Graph inputs that all parts read, in order."""
        return tuple(i for part in self.parts for i in part.inputs)

    @property
    def key(self) -> tuple[object, ...]:
        parts = tuple(part.key for part in self.parts)
        return (parts, self.experts, self.group_size, self.layout.name, self.interleaved)

    def with_layout(self, layout: Layout) -> "PackedSpec":
        return replace(self, layout=layout)

    def part_sources(self, sources: Sequence[Tensor]) -> Iterator[tuple[PackedPart, Tensors]]:
        """Each part with its own share of the tensors that `inputs` names."""
        start = 0
        for part in self.parts:
            stop = start + len(part.inputs)
            yield part, tuple(sources[start:stop])
            start = stop

    def stack(self, weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """The parts at one group size (repeating scales loses nothing), one above the other."""
        regrouped = [weight.regroup(self.group_size) for weight in weights]
        stacked = QuantizedWeight.cat(regrouped, max(1, self.experts))
        return stacked.gate_then_up(max(1, self.experts)) if self.interleaved else stacked

    def pack(self, stacked: QuantizedWeight) -> PackedTensors:
        """In the layout; experts are packed one by one, so both tensors begin with [E, ...]."""
        return pack_stack(stacked, self.experts, self.layout)

    def slices(self, stacked: QuantizedWeight) -> Iterator[QuantizedWeight | None]:
        """The parts again, as views of the stacked tensors; None where rows changed places."""
        moved = self.interleaved or (self.experts and len(self.parts) > 1)
        start = 0
        for part in self.parts:
            rows = part.rows * max(1, part.experts)
            yield None if moved else stacked.narrow(start, rows)
            start += rows

    def recover(self, packed: PackedTensors, index: int) -> QuantizedWeight:
        """Part `index` as `stack` was given it, bit for bit, from what `pack` made.

        The layout must have an `unpack`.
        """
        part, experts = self.parts[index], max(1, self.experts)
        start = sum(other.rows for other in self.parts[:index])
        formats = (self.bits, self.group_size, self.rows, self.k)
        stacked = unpack_stack(PackedLinear(*packed, *formats), self.experts, self.layout)
        if self.interleaved:
            stacked = stacked.gate_beside_up(experts)
        own = stacked.narrow_each(start, part.rows, experts).coarsen(part.plan.group_size)
        # cat made one dtype of all parts' scales; the way back is as exact.
        return replace(own, scale=own.scale.to(part.plan.scale_dtype))


def common_group_size(specs: list[PackedSpec]) -> int | None:
    """The group size that all specs can share without loss, or None.

    A column's one scale can be repeated for any groups; groups of G for any divisor of G.
    """
    sizes = {spec.group_size for spec in specs if spec.group_size < spec.k}
    if not sizes:
        return specs[0].k
    finest = min(sizes)
    return finest if all(size % finest == 0 for size in sizes) else None


def plan_of_packed(w: Tensor) -> QuantPlan | str:
    """How what was read of packed weights is quantised, or the reason why its codes do not serve.

    Its error was known when it was packed, and is not any more.
    """
    if not isinstance(w, PackedWeight) or w.form.transposed or w.ids is not None:
        return "the weight is packed, and is read here in a way that its codes cannot follow"
    form = w.form
    return QuantPlan(form.bits, form.group_size, form.scale_method, w.scale.dtype, math.nan)


def packed_already(spec: PackedSpec, sources: Sequence[Tensor]) -> PackedTensors | None:
    """The memory of a packed weight itself, where it is what `spec` asks for."""
    part = spec.parts[0]
    if len(spec.parts) > 1 or not any(isinstance(s, PackedWeight) for s in sources):
        return None
    w = part.recipe(*sources)
    assert isinstance(w, PackedWeight), "checked when it was planned"
    as_asked = (spec.layout.name, spec.group_size, False)
    as_it_is = (w.form.layout, w.form.group_size, spec.interleaved)
    return (w.qweight, w.scale) if as_it_is == as_asked else None


def share_memory(spec: PackedSpec, packed: PackedTensors, sources: Sequence[Tensor]) -> None:
    """Let packed weights that were stacked be rows of the stack: their own memory is released.

    Not where the stack has another layout or other groups, where rows have changed places, or
    where their blocks in memory would be cut.
    """
    narrow = spec.layout.narrow
    if narrow is None or spec.experts or spec.interleaved or len(spec.parts) < 2:
        return
    form = (spec.bits, spec.group_size, spec.rows, spec.k)
    start = 0
    for part, own in spec.part_sources(sources):
        memory = own[0].memory if isinstance(own[0], PackedWeight) else None
        if isinstance(memory, PackedMemory) and not part.recipe.steps:
            rows = narrow(PackedLinear(*packed, *form), start, part.rows)
            as_it_is = (memory.form.layout, memory.form.group_size, memory.scale.dtype)
            if rows is not None and as_it_is == (
                spec.layout.name,
                spec.group_size,
                packed[1].dtype,
            ):
                memory.qweight, memory.scale = rows
        start += part.rows
