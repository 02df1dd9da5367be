"""The format `pack-quantized` of compressed-tensors: int4 and int8 in groups or per channel.

M.weight_packed int32 [N, K·b/32], M.weight_scale [N, groups], M.weight_shape int64 [2] = [N, K]
M.weight [N, K]                                                          where M is not quantized
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import TensorPlace, read_tensor
from fqcompile.interop.assemble import ForeignLayer, symmetric
from fqcompile.interop.layers import BITS, WORD_BITS, Layer, Scheme, is_embedding
from fqcompile.interop.quantization_config import (
    FORMAT,
    configured_scheme,
    parse_quantization_config,
)
from fqcompile.tensor.codes import unpack
from fqcompile.tensor.format import QTYPES, UNIFORM, Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.tensor.words import from_words, words_per_row

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def read_compressed_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, ForeignLayer]:
    """The packed layers by name; no codes are read.

    Bits and numbers of groups come from the tensors; the config decides where these are ambiguous.

    Raises:
        CheckpointError: config or tensors are damaged, contradict each other, or are of a format
            that has no exact conversion; file and key are named.
    """
    parsed = parse_quantization_config(config.get("quantization_config"), where)
    formats = {parsed.format, *(group.format for group in parsed.groups)}
    if formats != {FORMAT}:
        raise CheckpointError(
            f"{where}: quantization_config.format is {', '.join(sorted(formats))}; this reads "
            f"{FORMAT!r}"
        )
    known = ", ".join(sorted({str(group.scheme) for group in parsed.groups}))
    found = {}
    for layer in read_layers(tensors):
        if layer.scheme is None:
            continue
        parts = (*PARTS, "weight_g_idx")
        places = {p: tensors[n] for p in parts if (n := f"{layer.name}.{p}") in tensors}
        file = places["weight_packed"].path
        if layer.scheme.bits not in BITS:
            raise CheckpointError(
                f"{file}: {layer.name} is {layer.scheme}; this reads int4 and int8"
            )
        scheme = configured_scheme(parsed, layer)
        if scheme is None:
            raise CheckpointError(
                f"{file}: {layer.name} is {layer.scheme}, which no group of quantization_config in "
                f"{where} is, or several are that match its name in no target: {known}"
            )
        _check_zero_points(layer, places)
        _check_order(layer, scheme, places)
        read = partial(_read, layer, scheme, places)
        found[layer.name] = ForeignLayer(layer.name, layer.n, layer.k, places, read)
    return found


def _check_order(layer: Layer, scheme: Scheme, places: Mapping[str, TensorPlace]) -> None:
    """Check that groups are contiguous columns; a g_idx of -1 means the default order."""
    place = places.get("weight_g_idx")
    if place is None:
        return
    index = read_tensor(place).long() if place.dtype in ("I32", "I64") else torch.empty(0)
    own = torch.arange(layer.k) // (scheme.group_size or layer.k)
    if index.shape != own.shape or not (torch.equal(index, own) or bool((index == -1).all())):
        raise CheckpointError(
            f"{place.path}: {layer.name}.weight_g_idx is not k // group_size for {scheme}: its "
            "columns are in act-order, which has no exact conversion"
        )


def _check_zero_points(layer: Layer, places: Mapping[str, TensorPlace]) -> None:
    place, scheme = places.get("weight_zero_point"), layer.scheme
    assert scheme is not None
    expected = (words_per_row(scheme.bits, layer.n), scheme.groups(layer.k))
    if place is not None and (place.dtype != "I32" or place.shape != expected):
        raise CheckpointError(
            f"{place.path}: {layer.name}.weight_zero_point is {place.dtype} {list(place.shape)}, "
            f"not I32 {list(expected)}"
        )


def _read(layer: Layer, scheme: Scheme, places: Mapping[str, TensorPlace]) -> QuantizedTensor:
    words, scale = read_tensor(places["weight_packed"]), read_tensor(places["weight_scale"])
    qweight = from_words(words, scheme.bits, layer.k)
    size = min(layer.k, scheme.group_size or layer.k)
    if "weight_zero_point" not in places:
        return QuantizedTensor(qweight, scale, Format(scheme.bits, size, layer.n, layer.k))
    qtype = QTYPES[scheme.bits, UNIFORM]
    packed = read_tensor(places["weight_zero_point"]).t().contiguous()  # along N
    zeros = unpack(from_words(packed, scheme.bits, layer.n), qtype, layer.n).t()
    codes = unpack(qweight, qtype, layer.k)
    where = f"{places['weight_packed'].path}: {layer.name}"
    return symmetric(codes.to(torch.int16), zeros, scale, size, where)


def read_layers(tensors: Mapping[str, TensorPlace]) -> list[Layer]:
    """All linear layers: packed ones, and dense matrices that are not embeddings.

    Raises:
        CheckpointError: tensors of a packed layer are missing or do not fit; file and tensor are
            named.
    """
    found = []
    for name, place in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            found.append(_packed_layer(module, tensors))
        elif part == "weight" and len(place.shape) == 2 and not is_embedding(module):
            found.append(Layer(module, *place.shape))
        elif part in PARTS and f"{module}.weight_packed" not in tensors:
            raise CheckpointError(f"{place.path}: {name} is there, {module}.weight_packed is not")
    return found


def _packed_layer(module: str, tensors: Mapping[str, TensorPlace]) -> Layer:
    packed, scale, shape, zero = (f"{module}.{part}" for part in PARTS)
    file = tensors[packed].path
    for name in (scale, shape):
        if name not in tensors:
            raise CheckpointError(f"{file}: {packed} is there, {name} is not")
    _check(packed, tensors[packed], ("I32",), 2)
    _check(scale, tensors[scale], ("F16", "BF16", "F32"), 2)
    _check(shape, tensors[shape], ("I64", "I32"), 1)
    if tensors[shape].shape != (2,):
        where = tensors[shape].path
        raise CheckpointError(f"{where}: {shape} has {tensors[shape].shape}, not (2,)")
    n, k = map(int, read_tensor(tensors[shape]).tolist())
    rows, words = tensors[packed].shape
    bits = next((b for b in range(1, 9) if -(-k * b // WORD_BITS) == words), None)
    if k % WORD_BITS:  # a few bits more or less would fill as many words
        bits = next((b for b in BITS if -(-k * b // WORD_BITS) == words), bits)
    scales, groups = tensors[scale].shape
    size = None if groups == 1 else -(-k // groups)
    scheme = Scheme(bits or 0, size, zero not in tensors)
    if min(n, k) < 1 or rows != n or scales != n or not bits or scheme.groups(k) != groups:
        raise CheckpointError(
            f"{file}: {packed} {[rows, words]} and {scale} {[scales, groups]} are not "
            f"codes and scales of {shape}, which says {[n, k]}"
        )
    return Layer(module, n, k, scheme)


def _check(name: str, place: TensorPlace, dtypes: Sequence[str], dims: int) -> None:
    if place.dtype not in dtypes or len(place.shape) != dims:
        raise CheckpointError(
            f"{place.path}: {name} is {place.dtype} {list(place.shape)}; it must be "
            f"{' or '.join(dtypes)} of {dims} dimensions"
        )
