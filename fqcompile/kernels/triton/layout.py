"""The fragment layout: codes in the order in which the tensor cores' registers want them.

One row of 128 columns of K is a run of 16 words (int4) or 32 (int8); 16 rows are one micro-tile.

    qweight  int32 [rows / 16, K / 128, 16, 16 or 32]     codes + 8 or + 128, so unsigned; see below
    scale    [groups or blocks, rows up to a multiple of 256, dots of a block]

A thread of an mma holds, for one row, the columns c * W + t * ... of every chunk c (t: its place
among four threads). Its words for four chunks are one 16-byte load:

    int4   word t * 4 + c,  c: 32 columns    nibble p * 4 + rep * 2 + h
           k = c * 32 + rep * 16 + place(t, h, p)
    int8   word (b, t * 4 + c),  b: 64 columns, c: 16 of them    byte p * 2 + h
           k = b * 64 + c * 16 + place(t, h, p)

Normal levels lie in pairs around one center, those of the codes q and -1 - q. A code is its pair,
three bits, and a sign. Four pairs are one selector of `prmt`, between whose bits are the signs:

    int4, normal   word t * 4 + c, code i = p * 2 + h of half rep
                   pair at bits 16 * rep + 4 * i and on, sign at bit 8 * i + 7 - 4 * rep

`place` is the operand order of the instruction: h * 8 + t * 2 + p as the hardware has it
(kwidth 2), or t * 4 + h * 2 + p, which Triton before 3.8 expects for mma.sync (kwidth 4). The wrong
one gives right results through a detour over shared memory.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from fqcompile.kernels.template import PackedTensors, Shape
from fqcompile.tensor.codes import pack as pack_plain
from fqcompile.tensor.codes import unpack as unpack_plain
from fqcompile.tensor.format import NORMAL, num_groups
from fqcompile.tensor.quantized import QuantizedTensor

VERSION = 1
MICRO_ROWS = 16
SCALE_ROWS = 256  # the widest tile, so that tiles read whole runs of scales
BLOCK_K = 128


def column_order(
    bits: int, levels: str, kwidth: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """int64 [words of a block, codes of a word]: the column of each code, lowest bits first."""
    arange = partial(torch.arange, device=device)
    t, h, p = torch.meshgrid(*map(arange, (4, 2, 2)), indexing="ij")
    place = h * 8 + t * 2 + p if kwidth == 2 else t * 4 + h * 2 + p
    chunk = arange(4)
    if bits == 4:
        rep = arange(2)
        # dimensions t, c, p, rep, h
        k = place.transpose(1, 2)[:, None, :, None, :] + 16 * rep[:, None]
        k = k + 32 * chunk[:, None, None, None]
        if levels == NORMAL:
            k = k.transpose(2, 3)
        return k.reshape(16, 8)
    # dimensions b, t, c, p, h
    k = place.transpose(1, 2)[:, None] + 16 * chunk[:, None, None]
    k = k + 64 * arange(2)[:, None, None, None, None]
    return k.reshape(32, 4)


def shapes(bits: int, group_size: int, rows: int, k: int) -> tuple[Shape, Shape]:
    """Of qweight and scale."""
    blocks, width = -(-k // BLOCK_K), dot_width(group_size, k)
    steps = num_groups(k, group_size) if width == BLOCK_K else blocks
    codes = (-(-rows // MICRO_ROWS), blocks, MICRO_ROWS, BLOCK_K * bits // 32)
    return codes, (steps, rows + -rows % SCALE_ROWS, BLOCK_K // width)


def pack(weight: QuantizedTensor, kwidth: int) -> PackedTensors:
    """qweight and scale as above; rows and K are filled up with zeros."""
    rows, k = weight.rows, weight.k
    bits, levels = weight.bits, weight.format.levels
    codes = unpack_plain(weight.qweight, weight.format.qtype, k)
    codes = F.pad(codes, (0, -k % BLOCK_K, 0, -rows % MICRO_ROWS))
    order = column_order(bits, levels, kwidth, codes.device)
    blocks = codes.view(-1, MICRO_ROWS, codes.shape[1] // BLOCK_K, BLOCK_K).transpose(1, 2)
    words = codes.new_zeros((*blocks.shape[:3], order.shape[0]), dtype=torch.int32)
    for place in range(order.shape[1]):
        words |= _put(blocks[..., order[:, place]].to(torch.int32), place, bits, levels)
    return words, _pack_scales(weight)


def _put(codes: torch.Tensor, place: int, bits: int, levels: str) -> torch.Tensor:
    """What the codes of a place contribute to their words."""
    if levels == NORMAL:
        return (codes ^ codes >> 31) << bits * place | (codes < 0).int() << _sign_bit(place)
    return codes + (1 << bits - 1) << bits * place


def _taken(words: torch.Tensor, place: int, bits: int, levels: str) -> torch.Tensor:
    """The codes that are at a place of these words."""
    unsigned = words >> bits * place & (1 << bits) - 1
    if levels == NORMAL:
        return unsigned & 7 ^ -(words >> _sign_bit(place) & 1)
    return unsigned - (1 << bits - 1)


def _sign_bit(place: int) -> int:
    return 8 * (place % 4) + 7 - 4 * (place // 4)


def unpack(weight: QuantizedTensor, kwidth: int) -> PackedTensors:
    """The plain layout again: what `pack` was given."""
    words, bits, k, levels = weight.qweight, weight.bits, weight.k, weight.format.levels
    order = column_order(bits, levels, kwidth, words.device)
    codes = words.new_empty((*words.shape[:3], BLOCK_K), dtype=torch.int8)
    for place in range(order.shape[1]):
        codes[..., order[:, place]] = _taken(words, place, bits, levels).to(torch.int8)
    rows = codes.transpose(1, 2).reshape(-1, words.shape[1] * BLOCK_K)[: weight.rows, :k]
    return pack_plain(rows, weight.format.qtype), _unpack_scales(weight)


def narrow(weight: QuantizedTensor, start: int, rows: int) -> PackedTensors | None:
    """Whole micro-tiles from row `start` on; their scales are copied, for rows are inside there."""
    if start % MICRO_ROWS or (rows % MICRO_ROWS and start + rows < weight.rows):
        return None
    some = slice(start // MICRO_ROWS, -(-(start + rows) // MICRO_ROWS))
    scale = F.pad(weight.scale[:, start : start + rows], (0, 0, 0, -rows % SCALE_ROWS))
    return weight.qweight[some], scale.contiguous()


def gather(weight: QuantizedTensor, ids: torch.Tensor, kwidth: int) -> PackedTensors:
    """The rows of these ids in the plain layout: each is unpacked as a micro-tile of its own."""
    words = weight.qweight[ids // MICRO_ROWS, :, ids % MICRO_ROWS].unsqueeze(2)
    form = replace(weight.format, rows=len(ids))
    return unpack(QuantizedTensor(words, weight.scale[:, ids], form), kwidth)


def blocks_per_group(group_size: int, k: int) -> int:
    """Blocks of K that share their scales; 0 where a row has one scale."""
    if group_size >= k:
        return 0
    return 1 if group_size % BLOCK_K else group_size // BLOCK_K


def dot_width(group_size: int, k: int) -> int:
    """Columns of K in one dot: none crosses a group, so a divisor of the group size."""
    return BLOCK_K if group_size >= k else min(BLOCK_K, group_size & -group_size)


def _pack_scales(weight: QuantizedTensor) -> torch.Tensor:
    rows, k = weight.rows, weight.k
    width = dot_width(weight.group_size, k)
    if width == BLOCK_K:
        groups = torch.arange(weight.scale.shape[1], device=weight.scale.device)
    else:
        end = k + -k % BLOCK_K
        starts = torch.arange(0, end, width, device=weight.scale.device).clamp_(max=k - 1)
        groups = starts // weight.group_size
    scale = F.pad(weight.scale[:, groups], (0, 0, 0, -rows % SCALE_ROWS))
    dots = BLOCK_K // width
    blocks = scale.view(scale.shape[0], len(groups) // dots, dots)
    return blocks.transpose(0, 1).contiguous()


def _unpack_scales(weight: QuantizedTensor) -> torch.Tensor:
    """[rows, groups]: each group's first dot has its scale."""
    dots = weight.scale.transpose(0, 1).flatten(1)[: weight.rows]
    width = dot_width(weight.group_size, weight.k)
    step = 1 if width == BLOCK_K else weight.group_size // width
    return dots[:, ::step][:, : num_groups(weight.k, weight.group_size)].contiguous()
