"""GPTQ and AWQ checkpoints: w = (q - z) * s, codes and zero points in 4 bits, eight in a word.

GPTQ, without act-order:
    M.qweight int32 [K/8, N]     nibble j of a word is the code of row 8i + j
    M.qzeros  int32 [G, N/8]     nibble j is z of column 8i + j; format "gptq" stores z - 1
    M.scales  [G, N]             M.g_idx int32 [K] = k // group_size
    The config decides what the tensors do not determine: `group_size`, and with `sym` the zero
    point, which is then 8 in either encoding (some programs write one encoding and name the other).

AWQ, version "gemm":
    M.qweight int32 [K, N/8]     M.qzeros int32 [G, N/8]     M.scales [G, N]
    nibbles 0 .. 7 of a word are columns 0 2 4 6 1 3 5 7 of its eight
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import TensorPlace, read_tensor
from fqcompile.files.untrusted import check_pattern, matches_pattern, shown
from fqcompile.interop.assemble import (
    ForeignLayer,
    check_groups,
    check_options,
    check_part,
    layer_parts,
    symmetric,
)
from fqcompile.tensor.quantized import QuantizedTensor

_CODES_PER_WORD, _BITS = 8, 4
_MIDDLE = 8  # the zero point of symmetric codes
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # and what is added to stored zero points
_LARGEST = (1 << _BITS) - 1
_EITHER = (True, False, None)
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
# Config keys of the packing order; programs use any of them.
_VERSION_KEYS = ("version", "format", "checkpoint_format")
# Keys of AutoAWQ's own files, and what transformers calls them.
_OWN_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}


def read_gptq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, ForeignLayer]:
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
            own, where, bits=("bits", _BITS), allowed={"sym": _EITHER, "desc_act": _EITHER}
        )
        rows, n = check_part(name, places, "qweight", ("I32",))
        k = rows * _CODES_PER_WORD
        groups, _ = check_part(name, places, "scales", ("F16", "BF16", "F32"), (None, n))
        check_part(name, places, "qzeros", ("I32",), (groups, -(-n // _CODES_PER_WORD)))
        size = check_groups(name, places["scales"], k, own, "group_size", where)
        _check_order(name, places, k, size, own, where)
        zero_points = partial(_zero_points, own.get("sym"), _FORMATS[stored], where)
        read = partial(_read_gptq_layer, name, places, (n, k), size, zero_points)
        found[name] = ForeignLayer(name, n, k, places, read)
    return found


def _format(options: Mapping[str, Any], where: str) -> str:
    """The format, which programs store under either key or both; "gptq" if under neither."""
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
    """Settings that `dynamic` overrides for matching layer names; the first match decides."""
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
    """Check that groups are contiguous columns; with static groups they are, despite `desc_act`."""
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


def _read_gptq_layer(
    name: str,
    places: Mapping[str, TensorPlace],
    shape: tuple[int, int],
    size: int,
    zero_points: partial[Tensor],
) -> QuantizedTensor:
    n, k = shape
    scale = read_tensor(places["scales"]).t()
    codes = _nibbles(read_tensor(places["qweight"]).t()).reshape(n, k)
    stored = _nibbles(read_tensor(places["qzeros"])).flatten(1)[:, :n].t()
    where = f"{places['qweight'].path}: {name}"
    zeros = zero_points(f"{where}.qzeros", stored.to(torch.int16))
    return symmetric(codes.to(torch.int16), zeros, scale, size, where)


def _zero_points(
    symmetric: bool | None, added: int, config: str, where: str, stored: Tensor
) -> Tensor:
    """The zero points that the stored numbers [N, G] encode.

    Args:
        symmetric: `sym` of the config. added: the offset that the format adds to stored numbers.

    Raises:
        CheckpointError: they contradict `sym`, or could mean two things.
    """
    low, high = map(int, stored.aminmax())
    middle = low == high and low in (_MIDDLE - 1, _MIDDLE)
    if symmetric:
        if not middle:
            raise CheckpointError(
                f"{where} stores {low} to {high}, and quantization_config.sym in {config} is True: "
                f"the zero point would be {_MIDDLE}, stored as {_MIDDLE - 1} or {_MIDDLE}; say "
                '"sym": false there if it was quantized so'
            )
        return torch.full_like(stored, _MIDDLE)
    if symmetric is None and middle and low + added != _MIDDLE:
        raise CheckpointError(
            f"{where} stores {low} alone, which is {_MIDDLE} for symmetric codes and {low + added} "
            f"for others, and {config} has no quantization_config.sym; say there which it is"
        )
    if added and high == _LARGEST:
        raise CheckpointError(
            f"{where} stores {high}, which programs read as zero point {high + 1} or 0: it cannot "
            "be converted exactly; save it with checkpoint_format gptq_v2"
        )
    return stored + added


def _nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] -> uint8 [..., W, 8], the lowest bits first."""
    shifts = torch.arange(0, _CODES_PER_WORD * _BITS, _BITS, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 0xF).to(torch.uint8)


def read_awq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, ForeignLayer]:
    """The packed layers by name; codes are read later.

    Raises:
        CheckpointError: tensors are missing or do not fit, or the version packs in another order;
            file and key are named.
    """
    options: Mapping[str, Any] = config["quantization_config"]
    bits, size_key = (own if own in options else key for own, key in _OWN_KEYS.items())
    gemm = ("gemm", "GEMM", None)
    allowed: dict[str, Sequence[object]] = dict.fromkeys(_VERSION_KEYS, gemm)
    allowed["zero_point"] = (True, False, None)
    check_options(options, where, bits=(bits, _BITS), allowed=allowed)
    found = {}
    for name, places in layer_parts(tensors, ("qweight", "qzeros", "scales"), (), where).items():
        k, words = check_part(name, places, "qweight", ("I32",))
        n = words * _CODES_PER_WORD
        groups, _ = check_part(name, places, "scales", ("F16", "BF16", "F32"), (None, n))
        check_part(name, places, "qzeros", ("I32",), (groups, words))
        size = check_groups(name, places["scales"], k, options, size_key, where)
        middle = where if options.get("zero_point") is False else None
        read = partial(_read_awq_layer, name, places, size, middle)
        found[name] = ForeignLayer(name, n, k, places, read)
    return found


def _read_awq_layer(
    name: str, places: Mapping[str, TensorPlace], size: int, symmetric_by: str | None
) -> QuantizedTensor:
    """`symmetric_by`: the config that declares all zero points to be the middle."""
    codes, zeros = (_columns(read_tensor(places[part])) for part in ("qweight", "qzeros"))
    scale = read_tensor(places["scales"]).t()
    where = f"{places['qweight'].path}: {name}"
    if symmetric_by is not None and bool((zeros != _MIDDLE).any()):
        low, high = map(int, zeros.aminmax())
        raise CheckpointError(
            f"{where}.qzeros stores {low} to {high}, and quantization_config.zero_point in "
            f"{symmetric_by} is False: it would be {_MIDDLE} throughout; say "
            '"zero_point": true there if it was quantized so'
        )
    return symmetric(codes.t().to(torch.int16), zeros.t(), scale, size, where)


def _columns(words: Tensor) -> Tensor:
    """int32 [R, N/8] -> uint8 [R, N]."""
    found = _nibbles(words)
    result = torch.empty_like(found)
    result[..., list(_COLUMNS)] = found
    return result.flatten(1)
