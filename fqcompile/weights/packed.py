"""PackedSpec: the packed tensors that a node reads, as a value that any instance can fill."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqcompile.kernels.template import PLAIN, Layout
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.recipe import WeightRecipe

Tensors = tuple[Tensor, ...]


def part_key(recipe: WeightRecipe, plan: QuantPlan) -> tuple[object, ...]:
    """Equal where the same sources give the same codes and scales."""
    return (recipe.key, plan.bits, plan.group_size, plan.scale_method, plan.scale_dtype)


@dataclass(frozen=True)
class PackedPart:
    """One site's share of the rows: its recipe, the inputs it reads, and how it is quantised."""

    recipe: WeightRecipe
    inputs: tuple[int, ...]
    plan: QuantPlan
    rows: int
    k: int

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where the same sources give the same codes and scales."""
        return part_key(self.recipe, self.plan)

    def quantize(self, sources: tuple[Tensor, ...]) -> QuantizedWeight:
        return quantize_weight(self.recipe(*sources), self.plan)


@dataclass(frozen=True)
class PackedSpec:
    """Parts stacked along the rows at one group size, in one layout."""

    parts: tuple[PackedPart, ...]
    group_size: int
    layout: Layout = PLAIN

    @property
    def bits(self) -> int:
        return self.parts[0].plan.bits

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def rows(self) -> int:
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
        return (tuple(part.key for part in self.parts), self.group_size, self.layout.name)

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
        return regrouped[0] if len(regrouped) == 1 else QuantizedWeight.cat(regrouped)

    def slices(self, stacked: QuantizedWeight) -> Iterator[QuantizedWeight]:
        """The parts again, as views of the stacked tensors."""
        start = 0
        for part in self.parts:
            yield QuantizedWeight(
                qweight=stacked.qweight.narrow(0, start, part.rows),
                scale=stacked.scale.narrow(0, start, part.rows),
                bits=stacked.bits,
                group_size=stacked.group_size,
                shape=(part.rows, part.k),
            )
            start += part.rows


def common_group_size(specs: list[PackedSpec]) -> int | None:
    """The group size that all specs can share without loss, or None.

    A column's one scale can be repeated for any groups; groups of G for any divisor of G.
    """
    sizes = {spec.group_size for spec in specs if spec.group_size < spec.k}
    if not sizes:
        return specs[0].k
    finest = min(sizes)
    return finest if all(size % finest == 0 for size in sizes) else None
