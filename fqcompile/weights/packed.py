"""PackedSpec: the packed tensors that a node reads, as a value that any instance can fill."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.kernels.template import PLAIN, Layout, PackedLinear, PackedTensors
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.recipe import WeightRecipe

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
        return quantize_weight(self.recipe(*sources), self.plan)


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
        if not self.experts:
            return self.layout.pack(stacked)
        if self.layout is PLAIN:  # already one expert after the other
            views = [t.unflatten(0, (self.experts, -1)) for t in (stacked.qweight, stacked.scale)]
            return views[0], views[1]
        return _pack_each(stacked.split(self.experts), self.layout)

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
        stacked = self._unpack(packed)
        if self.interleaved:
            stacked = stacked.gate_beside_up(experts)
        own = stacked.narrow_each(start, part.rows, experts).coarsen(part.plan.group_size)
        # cat made one dtype of all parts' scales; the way back is as exact.
        return replace(own, scale=own.scale.to(part.plan.scale_dtype))

    def _unpack(self, packed: PackedTensors) -> QuantizedWeight:
        unpack = self.layout.unpack
        assert unpack is not None
        matrices = list(zip(*packed, strict=True)) if self.experts else [packed]
        formats = (self.bits, self.group_size, self.rows, self.k)
        return QuantizedWeight.cat([unpack(PackedLinear(q, s, *formats)) for q, s in matrices])


def _pack_each(experts: Sequence[QuantizedWeight], layout: Layout) -> PackedTensors:
    """Into one tensor each from the start: a second copy of all experts would be large."""
    first = layout.pack(experts[0])
    qweight, scale = (in_huge_pages(t.new_empty((len(experts), *t.shape))) for t in first)
    for i, expert in enumerate(experts):
        qweight[i], scale[i] = layout.pack(expert)
    return qweight, scale


def common_group_size(specs: list[PackedSpec]) -> int | None:
    """The group size that all specs can share without loss, or None.

    A column's one scale can be repeated for any groups; groups of G for any divisor of G.
    """
    sizes = {spec.group_size for spec in specs if spec.group_size < spec.k}
    if not sizes:
        return specs[0].k
    finest = min(sizes)
    return finest if all(size % finest == 0 for size in sizes) else None
