"""What the files hold, in their order: shapes are known before, values are made when written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fqcompile.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, byte_size
from fqcompile.engines.layers import Layer
from fqcompile.engines.scheme import Scheme
from fqcompile.exports.harmonise import Choice
from fqcompile.exports.layout import Layout, Piece, Whole
from fqcompile.exports.saved import Saved
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.quant.words import to_words, widen, words_per_row

_PART = 1 << 25  # weights that are dequantised at once, and not a whole output head


@dataclass(frozen=True)
class Block:
    """Neighbours in a file: {name: (dtype of safetensors, shape)}, and how they are made.

    `make` yields their values in this order, a large one in parts; `release` gives back the memory
    of what they were made from.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    make: Callable[[], Iterator[Tensor]]
    release: Callable[[], None]

    @property
    def nbytes(self) -> int:
        return sum(byte_size(*entry) for entry in self.tensors.values())


def blocks(saved: Saved, layout: Layout, choices: Mapping[str, Choice]) -> Iterator[Block]:
    """All of a checkpoint."""
    for whole in layout.wholes:
        yield _whole_block(saved, whole)
    for piece in layout.pieces:
        scheme = choices[piece.name].scheme
        yield _dense_block(saved, piece) if scheme is None else _packed_block(saved, piece, scheme)


def layers(
    layout: Layout, choices: Mapping[str, Choice], dense: Mapping[str, Layer]
) -> list[Layer]:
    """The same as the rules of engines see it."""
    return [
        *dense.values(),
        *(Layer(p.name, p.n, p.k, choices[p.name].scheme) for p in layout.pieces),
    ]


def _packed_block(saved: Saved, piece: Piece, scheme: Scheme) -> Block:
    words = words_per_row(scheme.bits, piece.k)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{piece.name}.weight_packed": ("I32", (piece.n, words)),
        f"{piece.name}.weight_scale": (saved.dtype, (piece.n, scheme.groups(piece.k))),
        f"{piece.name}.weight_shape": ("I64", (2,)),
    }
    make = partial(_packed, saved, piece, scheme)
    return Block(tensors, make, partial(saved.release, piece.value))


def packed_bytes(piece: Piece, scheme: Scheme) -> int:
    """Of the codes and 16-bit scales of a layer."""
    words = words_per_row(scheme.bits, piece.k)
    return piece.n * (4 * words + 2 * scheme.groups(piece.k))


def _packed(saved: Saved, piece: Piece, scheme: Scheme) -> Iterator[Tensor]:
    weight = _rows(saved, piece)
    if scheme.bits > weight.bits:
        weight = widen(weight)
    if scheme.group_size is not None:
        weight = weight.regroup(scheme.group_size)
    yield to_words(weight.qweight, weight.bits, piece.k)
    yield weight.scale.to(DTYPES[saved.dtype])
    yield torch.tensor([piece.n, piece.k])


def _dense_block(saved: Saved, piece: Piece) -> Block:
    """Codes that the format cannot carry: the values that they stand for."""
    dtype = saved.manifest.packed[piece.value].dtype
    name = f"{piece.name}.weight"

    def make() -> Iterator[Tensor]:
        weight = _rows(saved, piece)
        step = max(1, _PART // piece.k)
        for start in range(0, piece.n, step):
            yield weight.narrow(start, min(step, piece.n - start)).dequantize(DTYPES[dtype])

    return Block({name: (dtype, (piece.n, piece.k))}, make, partial(saved.release, piece.value))


def _rows(saved: Saved, piece: Piece) -> QuantizedWeight:
    weight = saved.packed(piece.value)
    rows = piece.rows
    return replace(
        weight, qweight=weight.qweight[rows], scale=weight.scale[rows], shape=(piece.n, piece.k)
    )


def _whole_block(saved: Saved, whole: Whole) -> Block:
    tensors = {name: (DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in whole.tensors.items()}
    names = whole.reversion.names

    def make() -> Iterator[Tensor]:
        given = {name: _dense_value(saved, saved.values[name]) for name in names}
        results = whole.reversion.run(saved.model, given)
        yield from (results[name] for name in tensors)

    def release() -> None:
        for name in names:
            saved.release(saved.values[name])

    return Block(tensors, make, release)


def _dense_value(saved: Saved, value: str) -> Tensor:
    record = saved.record(value)
    if record is None:
        return saved.dense(value)
    w_hat = saved.packed(value).dequantize(DTYPES[record.dtype])
    matrix = w_hat.view(*((record.experts,) if record.experts else ()), record.rows, record.k)
    return matrix.transpose(-2, -1) if record.transposed else matrix
