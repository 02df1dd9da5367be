"""What the files hold, in their order, and the plan that tells it.

Shapes are known before, values are made when written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fqcompile.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, byte_size
from fqcompile.checkpoint.stream_writer import site_from
from fqcompile.config import HEAD_NAMES
from fqcompile.errors import UnquantizableWeight
from fqcompile.interop.export_layout import Layout, Piece, Saved, Whole
from fqcompile.interop.harmonize import HEADS_STAY, Choice
from fqcompile.interop.layers import Layer, Scheme
from fqcompile.report import Plan, Site
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.tensor.words import to_words, widen, words_per_row

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
        return saved.dense(value)
    matrix = saved.packed(value).dequantize(DTYPES[record.dtype])
    return matrix.transpose(-2, -1) if record.transposed else matrix


# What quantising says of heads that an export has told it to leave.
_HEADS_EXCLUDED = f"name matches exclude pattern {HEAD_NAMES.pattern!r}"


def export_plan(saved: Saved, layout: Layout, choices: Mapping[str, Choice]) -> Plan:
    """That of the saved model, with what became of each weight in the checkpoint."""
    pieces: dict[str, list[Piece]] = {}
    for piece in layout.pieces:
        pieces.setdefault(piece.source, []).append(piece)
    sites = []
    for site in map(site_from, saved.manifest.sites):
        own = pieces.get(site.name, [])
        reason = layout.reasons.get(site.name) or next(
            (r for piece in own if (r := choices[piece.name].reason)), None
        )
        if site.reason == _HEADS_EXCLUDED:
            site = replace(site, reason=HEADS_STAY)
        if site.status == "quantized":
            site = _kept_site(site, reason) if reason else _packed_site(site, own, choices)
        sites.append(site)
    return Plan(tuple(sites), saved.manifest.options)


def _kept_site(site: Site, reason: str) -> Site:
    return replace(
        site, status="kept", reason=f"written dense, as its int{site.bits} codes say: {reason}",
        bits=None, group_size=None, bytes_after=site.bytes_before, relative_error=None,
        expert_errors=None,
    )  # fmt: skip


def _packed_site(site: Site, pieces: Sequence[Piece], choices: Mapping[str, Choice]) -> Site:
    scheme = choices[pieces[0].name].scheme
    assert scheme is not None
    nbytes = sum(packed_bytes(piece, scheme) for piece in pieces)
    size = pieces[0].k if scheme.group_size is None else scheme.group_size
    return replace(site, bits=scheme.bits, group_size=size, bytes_after=nbytes)


def check_unsupported(plan: Plan, saved: Saved) -> None:
    """Raise UnquantizableWeight for the first packed weight that is written dense."""
    packed = {row["name"] for row in saved.manifest.sites if row["status"] == "quantized"}
    for site in plan.kept:
        if site.name in packed:
            raise UnquantizableWeight(f"{site.name}: {site.reason}")
