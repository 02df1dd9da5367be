"""GPTQ checkpoints in the order of the columns: w = (q - z) * s, codes and zero points in 4 bits.

M.qweight int32 [K/8, N]     nibble j of a word is the code of row 8i + j
M.qzeros  int32 [G, N/8]     nibble j is z of column 8i + j; format "gptq" stores z - 1
M.scales  [G, N]             M.g_idx int32 [K] = k // group_size

The config decides what the tensors leave open: `group_size`, and with `sym` the zero point, which
then is 8 whichever way it was stored (some programs write the one way and name the other).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fqcompile.checkpoint.json_text import shown
from fqcompile.checkpoint.safetensors_file import TensorPlace, read_tensor
from fqcompile.errors import CheckpointError
from fqcompile.interop.packed_layer import (
    BITS,
    CODES_PER_WORD,
    MIDDLE,
    PackedLayer,
    check_groups,
    check_options,
    check_part,
    layer_parts,
    nibbles,
    symmetric,
)
from fqcompile.interop.patterns import check_pattern, matches_pattern
from fqcompile.tensor.quantized import QuantizedTensor

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # and what is added to stored zero points
_LARGEST = (1 << BITS) - 1
_EITHER = (True, False, None)


def read_gptq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, PackedLayer]:
    """The packed layers by name; codes are read later.

    Raises:
        CheckpointError: tensors are missing, do not fit or contradict the config, or the layout has
            no exact conversion (act-order, other bits or formats); file and key are named.
    """
    options: Mapping[str, Any] = config["quantization_config"]
    stored = _format(options, where)
    changes = _changes(options, where)
    found = {}
    for name, places in layer_parts(
        tensors, ("qweight", "qzeros", "scales"), ("g_idx",), where
    ).items():
        own = {**options, **next((c for p, c in changes.items() if matches_pattern(p, name)), {})}
        check_options(
            own, where, bits=("bits", BITS), allowed={"sym": _EITHER, "desc_act": _EITHER}
        )
        rows, n = check_part(name, places, "qweight", ("I32",))
        k = rows * CODES_PER_WORD
        groups, _ = check_part(name, places, "scales", ("F16", "BF16", "F32"), (None, n))
        check_part(name, places, "qzeros", ("I32",), (groups, -(-n // CODES_PER_WORD)))
        size = check_groups(name, places["scales"], k, own, "group_size", where)
        _check_order(name, places, k, size, own, where)
        zero_points = partial(_zero_points, own.get("sym"), _FORMATS[stored], where)
        read = partial(_read, name, places, (n, k), size, zero_points)
        found[name] = PackedLayer(name, n, k, places, read)
    return found


def _format(options: Mapping[str, Any], where: str) -> str:
    """Programs write it under one key, the other, or both; the first GPTQ where neither is."""
    given = {key: options[key] for key in ("checkpoint_format", "format") if options.get(key)}
    for key, value in given.items():
        if not isinstance(value, str) or value not in _FORMATS:
            raise CheckpointError(
                f"{where}: quantization_config.{key} is {shown(repr(value))}; this reads "
                f"{', '.join(_FORMATS)}"
            )
    if len(set(given.values())) > 1:
        raise CheckpointError(
            f"{where}: quantization_config has {' and '.join(f'{k} {v}' for k, v in given.items())}"
            "; give both the one that the file was written in"
        )
    return next(iter(given.values()), "gptq")


def _changes(options: Mapping[str, Any], where: str) -> dict[str, Mapping[str, Any]]:
    """What `dynamic` changes for layers whose names match; the first that does decides."""
    dynamic, where = options.get("dynamic") or {}, f"{where}: quantization_config.dynamic"
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"{where} is {shown(dynamic)}; it must be a JSON object")
    found = {}
    for key, value in dynamic.items():
        if key.startswith("-:"):  # what is not quantized
            continue
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{where}.{shown(key)} is {shown(repr(value))}; it must be a JSON object"
            )
        pattern = key.removeprefix("+:")
        check_pattern(pattern, f"{where}.{shown(key)}")
        found[pattern] = value
    return found


def _check_order(
    name: str,
    places: Mapping[str, TensorPlace],
    k: int,
    size: int,
    options: Mapping[str, Any],
    where: str,
) -> None:
    """Columns are in groups of neighbors. `desc_act` alone does not tell: static groups are too."""
    place = places.get("g_idx")
    if place is None:
        if options.get("desc_act") and size < k:
            raise CheckpointError(
                f"{where}: quantization_config.desc_act is True, and {name} has no g_idx that says "
                "which columns share a scale; quantize it with desc_act=False"
            )
        return
    index = read_tensor(place) if place.dtype in ("I32", "I64") else None
    if index is None or index.shape != (k,):
        raise CheckpointError(
            f"{place.path}: {name}.g_idx is {place.dtype} {list(place.shape)}, not I32 {[k]}"
        )
    if not torch.equal(index.long(), torch.arange(k) // size):
        raise CheckpointError(
            f"{place.path}: {name}.g_idx is not k // group_size for group_size {size}: its columns "
            "are in act-order, which has no exact conversion; quantize it with desc_act=False"
        )


def _read(
    name: str,
    places: Mapping[str, TensorPlace],
    shape: tuple[int, int],
    size: int,
    zero_points: partial[Tensor],
) -> QuantizedTensor:
    n, k = shape
    scale = read_tensor(places["scales"]).t()
    codes = nibbles(read_tensor(places["qweight"]).t()).reshape(n, k)
    stored = nibbles(read_tensor(places["qzeros"])).flatten(1)[:, :n].t()
    where = f"{places['qweight'].path}: {name}"
    zeros = zero_points(f"{where}.qzeros", stored.to(torch.int16))
    return symmetric(codes.to(torch.int16), zeros, scale, size, where)


def _zero_points(
    symmetric: bool | None, added: int, config: str, where: str, stored: Tensor
) -> Tensor:
    """What the numbers [N, G] in a file mean.

    Args:
        symmetric: `sym` of the config. added: what its format adds to what is stored.

    Raises:
        CheckpointError: they contradict `sym`, or could mean two things.
    """
    low, high = map(int, stored.aminmax())
    middle = low == high and low in (MIDDLE - 1, MIDDLE)
    if symmetric:
        if not middle:
            raise CheckpointError(
                f"{where} stores {low} to {high}, and quantization_config.sym in {config} is True: "
                f"the zero point would be {MIDDLE}, stored as {MIDDLE - 1} or {MIDDLE}; say "
                '"sym": false there if it was quantized so'
            )
        return torch.full_like(stored, MIDDLE)
    if symmetric is None and middle and low + added != MIDDLE:
        raise CheckpointError(
            f"{where} stores {low} alone, which is {MIDDLE} for symmetric codes and {low + added} "
            f"for others, and {config} has no quantization_config.sym; say there which it is"
        )
    if added and high == _LARGEST:
        raise CheckpointError(
            f"{where} stores {high}, which programs read as zero point {high + 1} or 0: it cannot "
            "be converted exactly; save it with checkpoint_format gptq_v2"
        )
    return stored + added
