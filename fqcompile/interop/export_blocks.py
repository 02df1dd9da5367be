"""The form of each layer in the exported files, in order: packed in an engine's scheme, or dense.

`harmonize` gives one scheme to layers that an engine fuses into one tensor, without changing a
value: a scale of a group of 256 is repeated for two groups of 128, and an int4 code is also an int8
code. So fused layers get the coarsest group size that divides all of theirs, and the most bits.

    q channel, k group 64, v group 256  ->  group 64 for all         gate int4, up int8  ->  int8

Shapes are computed first; values are computed when they are written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fqcompile.files.safetensors_file import DTYPE_NAMES, DTYPES, byte_size
from fqcompile.interop.export_contents import Contents, Piece, Saved, Whole
from fqcompile.interop.layers import (
    BITS,
    GROUP_SIZES,
    Layer,
    Scheme,
    fused_name,
    is_head,
    is_router,
    is_split_along_k,
    last,
    stack_of,
)
from fqcompile.tensor.format import UNIFORM
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.tensor.words import to_words, widen, words_per_row

HEADS_STAY = "engines keep output heads dense"
_TABLES_STAY = "engines keep embedding tables dense"
_CHANNEL_EXPERTS = 64  # what K per device must be a multiple of, for one scale per channel


@dataclass(frozen=True)
class Choice:
    """The scheme of a layer, or the reason why its values are written dense."""

    scheme: Scheme | None
    reason: str | None = None


def harmonize(
    saved: Saved, pieces: Sequence[Piece], dense: Iterable[str], profile: str, tp: int
) -> dict[str, Choice]:
    """For each piece by name.

    Args:
        dense: names of other layers of the checkpoint.
        profile: "serve": experts of one layer are alike; "portable": all experts of the model.
        tp: degree of tensor parallelism whose shards groups must not cross.
    """
    dense = set(dense)
    names = dense | {piece.name for piece in pieces}
    units: dict[str, list[Piece]] = {}
    for piece in pieces:
        units.setdefault(_unit(piece.name, names, profile), []).append(piece)
    partners: dict[str, list[str]] = {}
    for name in sorted(dense):
        partners.setdefault(_unit(name, names, profile), []).append(name)
    inexact = {value: _type_problem(saved, value) for value in {p.value for p in pieces}}
    return {
        piece.name: choice
        for unit, members in units.items()
        for choice in [_choose(saved, members, partners.get(unit, []), inexact, tp)]
        for piece in members
    }


def _unit(name: str, names: set[str], profile: str) -> str:
    stack = stack_of(name)
    if stack is None:
        return fused_name(name, names)
    return "experts" if profile == "portable" else stack


def _choose(
    saved: Saved,
    members: Sequence[Piece],
    partners: Sequence[str],
    inexact: Mapping[str, str | None],
    tp: int,
) -> Choice:
    if partners:
        what = "the experts" if stack_of(partners[0]) else "one fused layer"
        return Choice(None, f"{last(partners[0])} of {what} is not quantized")
    sizes: set[int | None] = {None, *GROUP_SIZES}
    for piece in {(m.value, m.k, last(m.name)): m for m in members}.values():
        own = group_sizes(saved, piece, tp)
        reason = _built_dense(saved, piece) or _other_levels(saved, piece) or inexact[piece.value]
        if reason is None and not own:
            size = saved.manifest.packed[piece.value].group_size
            reason = (
                f"no group size of {GROUP_SIZES} divides both K = {piece.k}"
                f"{f' on each of {tp} devices' if tp > 1 else ''} and its own group size {size}"
            )
        if reason is not None:
            other = f"{last(piece.name)} beside it: " if len(members) > 1 else ""
            return Choice(None, other + reason)
        sizes &= own
    if not sizes:
        return Choice(None, "no group size suits all parts of the fused layer")
    bits = max(saved.manifest.packed[m.value].bits for m in members)
    if None in sizes:
        return Choice(Scheme(bits, None))
    return Choice(Scheme(bits, max(s for s in sizes if s is not None)))


def group_sizes(saved: Saved, piece: Piece, tp: int) -> set[int | None]:
    """Group sizes that a layer's own groups can be split into; None: one scale per channel."""
    own, k = saved.manifest.packed[piece.value].group_size, piece.k
    shard, rest = divmod(k, tp) if is_split_along_k(piece.name) else (k, 0)
    column = own >= k
    found: set[int | None] = {
        size
        for size in GROUP_SIZES
        if not rest and shard % size == 0 and (column or own % size == 0)
    }
    multiple = _CHANNEL_EXPERTS if stack_of(piece.name) else Scheme(min(BITS), None).codes_per_word
    if column and not rest and shard % multiple == 0:
        found.add(None)
    return found


def _built_dense(saved: Saved, piece: Piece) -> str | None:
    if isinstance(saved.model.get_submodule(piece.source.rpartition(".")[0]), nn.Embedding):
        return _TABLES_STAY
    if is_head(piece.name) or piece.source in saved.ties:
        return HEADS_STAY
    if is_router(piece.name):
        return "engines keep routers of experts dense"
    return None


def _other_levels(saved: Saved, piece: Piece) -> str | None:
    levels = saved.manifest.packed[piece.value].levels
    if levels == UNIFORM:
        return None
    return (
        f"its levels are {levels}, and compressed-tensors has uniform ones alone: export the "
        "checkpoint that it was made from, or quantize with levels='uniform'"
    )


def _type_problem(saved: Saved, value: str) -> str | None:
    """Why scales are not exact in the model's dtype, which engines use for them; else None."""
    record = saved.manifest.packed[value]
    if record.dtype != saved.dtype:
        return f"it is {record.dtype} in a model of {saved.dtype}"
    stored, dtype = saved.manifest.tensors[record.scale].dtype, DTYPES[saved.dtype]
    if stored == saved.dtype or saved.dtype == "F32":
        return None
    scale = saved.packed(value).scale
    if bool((scale.to(dtype).double() == scale.double()).all()):
        return None
    return f"its scales are not exact in the model's {saved.dtype}"


_PART = 1 << 25  # weights that are dequantized at once, and not a whole output head


@dataclass(frozen=True)
class Block:
    """Adjacent tensors in a file: {name: (safetensors dtype, shape)}, and how to compute them.

    `make` yields their values in this order, large ones in parts; `release` frees the memory of
    their sources.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    make: Callable[[], Iterator[Tensor]]
    release: Callable[[], None]

    @property
    def nbytes(self) -> int:
        return sum(byte_size(*entry) for entry in self.tensors.values())


def blocks(saved: Saved, contents: Contents, choices: Mapping[str, Choice]) -> Iterator[Block]:
    """All of a checkpoint."""
    for whole in contents.wholes:
        yield _whole_block(saved, whole)
    for piece in contents.pieces:
        scheme = choices[piece.name].scheme
        yield _dense_block(saved, piece) if scheme is None else _packed_block(saved, piece, scheme)


def layers(
    contents: Contents, choices: Mapping[str, Choice], dense: Mapping[str, Layer]
) -> list[Layer]:
    """The same as the rules of engines see it."""
    return [
        *dense.values(),
        *(Layer(p.name, p.n, p.k, choices[p.name].scheme) for p in contents.pieces),
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
    """A weight that the format cannot represent, as dequantized values."""
    dtype = saved.manifest.packed[piece.value].dtype
    name = f"{piece.name}.weight"

    def make() -> Iterator[Tensor]:
        weight = _rows(saved, piece)
        step = max(1, _PART // piece.k)
        for start in range(0, piece.n, step):
            yield weight.narrow(start, min(step, piece.n - start)).dequantize(DTYPES[dtype])

    return Block({name: (dtype, (piece.n, piece.k))}, make, partial(saved.release, piece.value))


def _rows(saved: Saved, piece: Piece) -> QuantizedTensor:
    weight = saved.packed(piece.value)
    codes, scale = weight.as_rows()
    form = replace(weight.format.one, rows=piece.n, transposed=False)
    return QuantizedTensor(codes[piece.rows], scale[piece.rows], form)


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
        return saved.shards.tensor(value)
    matrix = saved.packed(value).dequantize(DTYPES[record.dtype])
    return matrix.transpose(-2, -1) if record.transposed else matrix
