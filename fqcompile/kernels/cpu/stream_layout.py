"""The layout of the x86 kernel: blocks of 64 outputs, each in the order it is read.

    qweight [blocks, (K rounded up to 8) / codes in a word, 64] int32; a word has 8 (int4) or
            4 (int8) neighboring codes of one row as two's complement. Code i is at bit
            16 * (i odd) + bits * (i // 2): of each pair one code in either half of the word
    scale   [blocks, groups, 64] as given; rows that fill up the last block have codes and scales 0

No number of rows or columns needs another layout, so decode, prefill and backward share one copy.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.kernels.template import PackedTensors, Shape
from fqcompile.tensor.chunks import each_chunk
from fqcompile.tensor.codes import dequantize_rows
from fqcompile.tensor.format import num_groups
from fqcompile.tensor.quantized import QuantizedTensor

OUTPUTS = 64
STEP = 8  # K is rounded up to a multiple of it
_CHUNK_SHARE = 8.0
# Plain int4 codes are stored plus 8: this makes all eight of a word two's complement.
_PLAIN_OFFSET = {4: 0x88888888 - (1 << 32), 8: 0}


def shapes(bits: int, group_size: int, rows: int, k: int) -> tuple[Shape, Shape]:
    """Of qweight and scale."""
    blocks, words = -(-rows // OUTPUTS), (k + -k % STEP) * bits // 32
    return (blocks, words, OUTPUTS), (blocks, num_groups(k, group_size), OUTPUTS)


def pack(weight: QuantizedTensor) -> PackedTensors:
    """qweight and scale in this layout."""
    n, k = weight.rows, weight.k
    shape, _ = shapes(weight.bits, weight.group_size, n, k)
    blocks = shape[0]
    # Of the codes' own kind: while a graph is traced they are no ordinary tensors.
    words = in_huge_pages(weight.qweight.new_empty(shape, dtype=torch.int32))
    plain = weight.qweight.view(torch.uint8)

    def fill(some: slice) -> None:
        rows = plain[some.start * OUTPUTS : some.stop * OUTPUTS]
        own = plain.new_empty((some.stop - some.start) * OUTPUTS, 4 * words.shape[1])
        own.view(torch.int32).fill_(_PLAIN_OFFSET[weight.bits])
        own[: rows.shape[0], : rows.shape[1]] = rows
        codes = own.view(torch.int32) ^ _PLAIN_OFFSET[weight.bits]
        moved = _move(codes, weight.bits, to_pairs=True)
        words[some] = moved.view(-1, OUTPUTS, words.shape[1]).transpose(1, 2)

    each_chunk(fill, words.view(blocks, -1), _CHUNK_SHARE)
    scale = pad(weight.scale, (0, 0, 0, -n % OUTPUTS)).view(blocks, OUTPUTS, -1)
    return words, scale.transpose(1, 2).contiguous()


def unpack(weight: QuantizedTensor) -> PackedTensors:
    """The plain layout again: what `pack` was given."""
    storage = weight.format.qtype.storage_dtype
    words = weight.qweight.transpose(1, 2).flatten(0, 1).contiguous()
    plain = _move(words, weight.bits, to_pairs=False) ^ _PLAIN_OFFSET[weight.bits]
    columns = -(-weight.k * weight.bits // 8)
    qweight = plain.view(storage)[: weight.rows, :columns].contiguous()
    scale = weight.scale.transpose(1, 2).reshape(-1, weight.scale.shape[1])[: weight.rows]
    return qweight, scale.contiguous()


def narrow(weight: QuantizedTensor, start: int, rows: int) -> PackedTensors | None:
    """Whole blocks from row `start` on; None where blocks would be cut."""
    if start % OUTPUTS or (rows % OUTPUTS and start + rows < weight.rows):
        return None
    some = slice(start // OUTPUTS, -(-(start + rows) // OUTPUTS))
    return weight.qweight[some], weight.scale[some]


def gather(weight: QuantizedTensor, ids: Tensor) -> PackedTensors:
    """The rows of these ids in the plain layout: each is unpacked as a block of its own."""
    block, place = ids // OUTPUTS, ids % OUTPUTS
    qweight, scale = (tensor[block, :, place].unsqueeze(-1) for tensor in weight.tensors)
    return unpack(QuantizedTensor(qweight, scale, replace(weight.format, rows=len(ids))))


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """ŵ [rows, K] in `dtype` by PyTorch's operations alone; where the kernel runs it is faster."""
    f = weight.format
    return dequantize_rows(*unpack(weight), f.qtype, f.group_size, f.k, dtype)


def _move(words: Tensor, bits: int, *, to_pairs: bool) -> Tensor:
    """Codes from where they follow one another in a word to where pairs are read, or back."""
    mask = (1 << bits) - 1
    moved = torch.zeros_like(words, memory_format=torch.contiguous_format)
    for i in range(32 // bits):
        source, target = bits * i, 16 * (i % 2) + bits * (i // 2)
        if not to_pairs:
            source, target = target, source
        moved |= ((words >> source) & mask) << target
    return moved
