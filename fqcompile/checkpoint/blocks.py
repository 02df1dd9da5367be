"""Blocks: tensors that were saved in parts, cut and joined to what another number of ranks holds.

Of packed weights codes and scales go along unchanged. Rows can be cut anywhere. Columns can be cut
and joined where groups end, or where finer groups, with scales repeated, would.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fqcompile.distributed.layout import Layout, Run
from fqcompile.errors import CheckpointError
from fqcompile.tensor.codes import pack, unpack
from fqcompile.tensor.format import QTYPES
from fqcompile.tensor.quantized import QuantizedWeight

# Scales of finer groups would weigh as much as the codes.
LEAST_GROUP = 16


@dataclass(frozen=True, eq=False)
class DenseBlock:
    """A plain tensor."""

    tensor: Tensor

    def narrow(self, dim: int, start: int, stop: int) -> Self:
        """From `start` to `stop` of one dimension."""
        return type(self)(self.tensor.narrow(dim, start, stop - start))

    @classmethod
    def join(cls, blocks: Sequence[Self], dim: int) -> Self:
        """One behind the other."""
        return cls(torch.cat([block.tensor for block in blocks], dim))


@dataclass(frozen=True, eq=False)
class PackedBlock:
    """A packed weight in the plain layout, by the dimensions of the dense one.

    These are [N, K] or [E, N, K], with the last two exchanged where it is `transposed`.
    """

    weight: QuantizedWeight
    experts: int
    transposed: bool

    def narrow(self, dim: int, start: int, stop: int) -> Self:
        """From `start` to `stop` of one dimension.

        Raises:
            CheckpointError: a group would be cut, or nothing would be left.
        """
        if start == stop:
            raise CheckpointError("a rank would have none of it")
        experts, size = self.experts, stop - start
        match self._axis(dim):
            case "experts":
                rows = self.weight.shape[0] // experts
                part, experts = self.weight.narrow(start * rows, size * rows), size
            case "rows":
                part = self.weight.narrow_each(start, size, max(1, experts))
            case _:
                part = _columns(self.weight, start, stop)
        return replace(self, weight=part, experts=experts)

    @classmethod
    def join(cls, blocks: Sequence[Self], dim: int) -> Self:
        """One behind the other.

        Raises:
            CheckpointError: they have unlike bits, or groups that do not go together.
        """
        first, weights = blocks[0], [block.weight for block in blocks]
        if len({weight.bits for weight in weights}) > 1:
            raise CheckpointError(f"its parts have {sorted(w.bits for w in weights)} bits")
        axis = first._axis(dim)
        if axis == "k":
            return replace(first, weight=_beside(weights))
        weights = _regrouped(weights, 0)
        if axis == "experts":
            experts = sum(block.experts for block in blocks)
            return replace(first, weight=QuantizedWeight.cat(weights), experts=experts)
        return replace(first, weight=QuantizedWeight.cat(weights, max(1, first.experts)))

    def _axis(self, dim: int) -> str:
        matrix = ("k", "rows") if self.transposed else ("rows", "k")
        return (("experts", *matrix) if self.experts else matrix)[dim]


Block = DenseBlock | PackedBlock


def assemble(part: Callable[[int], Block], saved: Layout, wanted: Layout | None) -> Block:
    """What this process wants (None: all) of what `saved` says the parts hold.

    Raises:
        CheckpointError: a group would be cut, or the parts do not go together.
    """
    size = max(stop for runs in saved.runs for _, stop in runs)
    along = wanted is not None and wanted.dim == saved.dim
    runs = wanted.runs[wanted.own] if wanted is not None and along else ((0, size),)
    block = _take(part, saved, runs)
    if wanted is None or along:
        return block
    return _joined([block.narrow(wanted.dim, *r) for r in wanted.runs[wanted.own]], wanted.dim)


def _take(part: Callable[[int], Block], saved: Layout, runs: Sequence[Run]) -> Block:
    """The runs of the dimension that the parts share, from whichever parts have them."""
    pieces = []
    for number, held in enumerate(saved.runs):
        offset = 0
        for low, high in held:
            pieces.append((low, high, number, offset))
            offset += high - low
    found = []
    for start, stop in runs:
        for low, high, number, offset in sorted(pieces):
            a, b = max(low, start), min(high, stop)
            if a < b:
                here = offset + a - low
                found.append(part(number).narrow(saved.dim, here, here + b - a))
    return _joined(found or [part(0).narrow(saved.dim, 0, 0)], saved.dim)


def _joined(blocks: Sequence[Block], dim: int) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    packed = [block for block in blocks if isinstance(block, PackedBlock)]
    dense = [block for block in blocks if isinstance(block, DenseBlock)]
    if packed and dense:
        raise CheckpointError("some of its parts are packed and some are not")
    return PackedBlock.join(packed, dim) if packed else DenseBlock.join(dense, dim)


def _columns(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Part of each row; where it begins inside a group, in finer groups."""
    (n, k), group = weight.shape, weight.group_size
    if (start, stop) == (0, k):
        return weight
    if start // group == (stop - 1) // group:
        scale, group = weight.scale[:, start // group].unsqueeze(1), stop - start
    else:
        finer = _checked(math.gcd(group, start), f"column {start} is inside a group of {group}")
        scale = weight.regroup(finer).scale[:, start // finer : -(-stop // finer)]
        group = min(finer, stop - start)
    qtype = QTYPES[weight.bits]
    codes = pack(unpack(weight.qweight, qtype, k)[:, start:stop].contiguous(), qtype)
    return QuantizedWeight(codes, scale.contiguous(), weight.bits, group, (n, stop - start))


def _beside(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows that go on in the next part."""
    qtype, k = QTYPES[weights[0].bits], sum(w.shape[1] for w in weights)
    regrouped = _regrouped(weights, math.gcd(*(w.shape[1] for w in weights[:-1])))
    codes = torch.cat([unpack(w.qweight, qtype, w.shape[1]) for w in weights], 1)
    scale = torch.cat([w.scale for w in regrouped], 1)
    # a last part of fewer columns than a group has them as a short group
    group, shape = max(w.group_size for w in regrouped), (weights[0].shape[0], k)
    return QuantizedWeight(pack(codes, qtype), scale, weights[0].bits, group, shape)


def _regrouped(weights: Sequence[QuantizedWeight], ends: int) -> list[QuantizedWeight]:
    """At the coarsest groups that all have and that also end at multiples of `ends`."""
    sizes = {w.group_size for w in weights}
    if len(sizes) == 1 and not ends:
        return list(weights)
    inner = [w.group_size for w in weights if w.group_size < w.shape[1]]
    common = math.gcd(ends, *inner)
    text = f"its parts have groups of {sorted(sizes)}, and end at multiples of {ends or 'a row'}"
    return [w.regroup(_checked(common, text)) for w in weights]


def _checked(group: int, text: str) -> int:
    if group < LEAST_GROUP:
        raise CheckpointError(f"{text}: groups of {group} would be needed, {LEAST_GROUP} at least")
    return group
