"""The format `pack-quantized` of compressed-tensors: int4 and int8 in groups or per channel."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fqcompile.checkpoint.safetensors_file import TensorPlace, read_tensor
from fqcompile.errors import CheckpointError
from fqcompile.interop.check import read_layers
from fqcompile.interop.layers import BITS, PARTS, Layer, Scheme
from fqcompile.interop.packed_layer import PackedLayer, symmetric
from fqcompile.interop.quantization_config import (
    FORMAT,
    configured_scheme,
    parse_quantization_config,
)
from fqcompile.tensor.codes import unpack
from fqcompile.tensor.format import QTYPES, Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.tensor.words import from_words, words_per_row


def read_compressed_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, PackedLayer]:
    """The packed layers by name; no codes are read.

    Bits and numbers of groups are those of the tensors; the config decides what these leave open.

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
        found[layer.name] = PackedLayer(layer.name, layer.n, layer.k, places, read)
    return found


def _check_order(layer: Layer, scheme: Scheme, places: Mapping[str, TensorPlace]) -> None:
    """Columns that share a scale are neighbors; -1 throughout: nobody has said otherwise."""
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
    qtype = QTYPES[scheme.bits]
    packed = read_tensor(places["weight_zero_point"]).t().contiguous()  # along N
    zeros = unpack(from_words(packed, scheme.bits, layer.n), qtype, layer.n).t()
    codes = unpack(qweight, qtype, layer.k)
    where = f"{places['weight_packed'].path}: {layer.name}"
    return symmetric(codes.to(torch.int16), zeros, scale, size, where)
