"""The format `pack-quantized` of compressed-tensors: int4 and int8 in groups or per channel."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fqcompile.checkpoint.safetensors_file import TensorPlace, read_tensor
from fqcompile.engines.check import read_layers
from fqcompile.engines.layers import PARTS, Layer
from fqcompile.engines.quantization_config import FORMAT, parse_quantization_config
from fqcompile.engines.scheme import BITS
from fqcompile.errors import CheckpointError
from fqcompile.imports.packed_layer import PackedLayer, symmetric
from fqcompile.quant.packing import unpack
from fqcompile.quant.qtype import QTYPES
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.quant.words import from_words, words_per_row


def read_compressed_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, PackedLayer]:
    """The packed layers by name; no codes are read.

    Bits and group sizes are those of the tensors; that the config says the same is checked.

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
    known = {group.scheme for group in parsed.groups}
    found = {}
    for layer in read_layers(tensors):
        if layer.scheme is None:
            continue
        places = {p: tensors[n] for p in PARTS if (n := f"{layer.name}.{p}") in tensors}
        file = places["weight_packed"].path
        if layer.scheme.bits not in BITS:
            raise CheckpointError(
                f"{file}: {layer.name} is {layer.scheme}; this reads int4 and int8"
            )
        if layer.scheme not in known and not _is_one_group(layer, known):
            raise CheckpointError(
                f"{file}: {layer.name} is {layer.scheme}, which no group of quantization_config in "
                f"{where} is: {', '.join(sorted(map(str, known)))}"
            )
        _check_zero_points(layer, places)
        read = partial(_read, layer, places)
        found[layer.name] = PackedLayer(layer.name, layer.n, layer.k, places, read)
    return found


def _is_one_group(layer: Layer, known: set[Any]) -> bool:
    """A single group as wide as K looks like a channel."""
    scheme = layer.scheme
    assert scheme is not None
    same = [s for s in known if (s.bits, s.symmetric) == (scheme.bits, scheme.symmetric)]
    return scheme.group_size is None and any(s.group_size == layer.k for s in same)


def _check_zero_points(layer: Layer, places: Mapping[str, TensorPlace]) -> None:
    place, scheme = places.get("weight_zero_point"), layer.scheme
    assert scheme is not None
    expected = (words_per_row(scheme.bits, layer.n), scheme.groups(layer.k))
    if place is not None and (place.dtype != "I32" or place.shape != expected):
        raise CheckpointError(
            f"{place.path}: {layer.name}.weight_zero_point is {place.dtype} {list(place.shape)}, "
            f"not I32 {list(expected)}"
        )


def _read(layer: Layer, places: Mapping[str, TensorPlace]) -> QuantizedWeight:
    scheme = layer.scheme
    assert scheme is not None
    words, scale = read_tensor(places["weight_packed"]), read_tensor(places["weight_scale"])
    qweight = from_words(words, scheme.bits, layer.k)
    size = layer.k if scheme.group_size is None else scheme.group_size
    if "weight_zero_point" not in places:
        return QuantizedWeight(qweight, scale, scheme.bits, size, (layer.n, layer.k))
    qtype = QTYPES[scheme.bits]
    packed = read_tensor(places["weight_zero_point"]).t().contiguous()  # along N
    zeros = unpack(from_words(packed, scheme.bits, layer.n), qtype, layer.n).t()
    codes = unpack(qweight, qtype, layer.k)
    where = f"{places['weight_packed'].path}: {layer.name}"
    return symmetric(codes.to(torch.int16), zeros, scale, size, where)
