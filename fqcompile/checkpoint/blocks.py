"""Blocks: reshard tensors that were saved in shards for another number of ranks.

Codes and scales of packed weights are not changed. Rows can be cut anywhere. Columns can be cut and
joined at group boundaries, also of finer groups with repeated scales.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fqcompile.distributed.shards import Run, Sharding
from fqcompile.errors import CheckpointError
from fqcompile.tensor.codes import pack, unpack
from fqcompile.tensor.quantized import QuantizedTensor

# Scales of finer groups would weigh as much as the codes.
LEAST_GROUP = 16


# A plain tensor, or a packed weight in the plain layout, by the dimensions of the dense one.
Block = Tensor | QuantizedTensor


def narrow(block: Block, dim: int, start: int, stop: int) -> Block:
    """The part from `start` to `stop` of one dimension.

    Raises:
        CheckpointError: a group of a packed weight would be cut, or the part would be empty.
    """
    size = stop - start
    if isinstance(block, Tensor):
        return block.narrow(dim, start, size)
    if not size:
        raise CheckpointError("a rank would have none of it")
    match _axis(block, dim):
        case "experts":
            return block.some_experts(start, size)
        case "rows":
            return block.narrow(start, size)
        case _:
            return _columns(block, start, stop)


def join(blocks: Sequence[Block], dim: int) -> Block:
    """Concatenate parts along a dimension.

    Raises:
        CheckpointError: only some are packed, or their bits differ, or their groups are
            incompatible.
    """
    if len(blocks) == 1:
        return blocks[0]
    weights = [block for block in blocks if isinstance(block, QuantizedTensor)]
    dense = [block for block in blocks if isinstance(block, Tensor)]
    if weights and dense:
        raise CheckpointError("some of its parts are packed and some are not")
    if dense:
        return torch.cat(dense, dim)
    kinds = sorted({(weight.bits, weight.format.levels) for weight in weights})
    if len(kinds) > 1:
        raise CheckpointError(f"its parts have bits and levels of {kinds}; they must be equal")
    axis = _axis(weights[0], dim)
    if axis == "k":
        return _beside(weights)
    return QuantizedTensor.cat(_regrouped(weights, 0), 0 if axis == "experts" else -2)


def _axis(weight: QuantizedTensor, dim: int) -> str:
    matrix = ("k", "rows") if weight.format.transposed else ("rows", "k")
    return (("experts", *matrix) if weight.format.experts else matrix)[dim]


def assemble(part: Callable[[int], Block], saved: Sharding, wanted: Sharding | None) -> Block:
    """Assemble the part that this process needs (None: all) from the parts that `saved` describes.

    Raises:
        CheckpointError: a group would be cut, or the parts are incompatible.
    """
    size = max(stop for runs in saved.runs for _, stop in runs)
    along = wanted is not None and wanted.dim == saved.dim
    runs = wanted.runs[wanted.own] if wanted is not None and along else ((0, size),)
    block = _take(part, saved, runs)
    if wanted is None or along:
        return block
    return join([narrow(block, wanted.dim, *r) for r in wanted.runs[wanted.own]], wanted.dim)


def _take(part: Callable[[int], Block], saved: Sharding, runs: Sequence[Run]) -> Block:
    """The runs of the sharded dimension, each from a part that has it."""
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
                found.append(narrow(part(number), saved.dim, here, here + b - a))
    return join(found or [narrow(part(0), saved.dim, 0, 0)], saved.dim)


def _columns(weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """A part of each row; if it begins inside a group, in finer groups."""
    k, group = weight.k, weight.group_size
    if (start, stop) == (0, k):
        return weight
    if start // group == (stop - 1) // group:
        scale, group = weight.scale[..., start // group].unsqueeze(-1), stop - start
    else:
        finer = _checked(math.gcd(group, start), f"column {start} is inside a group of {group}")
        scale = weight.regroup(finer).scale[..., start // finer : -(-stop // finer)]
        group = min(finer, stop - start)
    codes = unpack(weight.as_rows()[0], weight.format.qtype, k)[:, start:stop]
    return _of_columns(weight, codes, scale, group)


def _beside(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Concatenate rows that continue in the next part."""
    regrouped = _regrouped(weights, math.gcd(*(w.k for w in weights[:-1])))
    codes = torch.cat([unpack(w.as_rows()[0], w.format.qtype, w.k) for w in weights], 1)
    scale = torch.cat([w.scale for w in regrouped], -1)
    # a last part of fewer columns than a group has them as a short group
    return _of_columns(weights[0], codes, scale, max(w.group_size for w in regrouped))


def _of_columns(
    like: QuantizedTensor, codes: Tensor, scale: Tensor, group_size: int
) -> QuantizedTensor:
    """A weight of codes [all rows, columns] and scales, in the format of `like` except for K."""
    form = replace(like.format, k=codes.shape[1], group_size=group_size)
    qweight = pack(codes.contiguous(), form.qtype)
    return QuantizedTensor.of_rows(qweight, scale.reshape(len(codes), -1).contiguous(), form)


def _regrouped(weights: Sequence[QuantizedTensor], ends: int) -> list[QuantizedTensor]:
    """Regroup to the coarsest group size that fits all parts and divides `ends`."""
    sizes = {w.group_size for w in weights}
    if len(sizes) == 1 and not ends:
        return list(weights)
    inner = [w.group_size for w in weights if w.group_size < w.k]
    common = math.gcd(ends, *inner)
    text = f"its parts have groups of {sorted(sizes)}, and end at multiples of {ends or 'a row'}"
    return [w.regroup(_checked(common, text)) for w in weights]


def _checked(group: int, text: str) -> int:
    if group < LEAST_GROUP:
        raise CheckpointError(f"{text}: groups of {group} would be needed, {LEAST_GROUP} at least")
    return group
