"""GPTQ checkpoints without act-order: w = (q - z) * s, codes and zero points in 4 bits.

M.qweight int32 [K/8, N]     nibble j of a word is the code of row 8i + j
M.qzeros  int32 [G, N/8]     nibble j is z of column 8i + j; format "gptq" stores z - 1
M.scales  [G, N]             M.g_idx int32 [K] = k // group_size

The config decides what the tensors do not determine: `group_size`, and with `sym` the zero point,
which is then 8 in either encoding (some programs write one encoding and name the other).

AWQ shares the checks of config keys, of a layer's tensors and of groups.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import CheckpointError
from fqcompile.files.json_text import shown
from fqcompile.files.safetensors_file import TensorPlace, read_tensor
from fqcompile.interop.assemble import ForeignLayer, symmetric
from fqcompile.interop.patterns import check_pattern, matches_pattern
from fqcompile.tensor.format import num_groups
from fqcompile.tensor.quantized import QuantizedTensor

CODES_PER_WORD, BITS = 8, 4
MIDDLE = 8  # the zero point of symmetric codes
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # and what is added to stored zero points
_LARGEST = (1 << BITS) - 1
_EITHER = (True, False, None)


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
    """The zero points that the stored numbers [N, G] encode.

    Args:
        symmetric: `sym` of the config. added: the offset that the format adds to stored numbers.

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


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] -> uint8 [..., W, 8], the lowest bits first."""
    shifts = torch.arange(0, CODES_PER_WORD * BITS, BITS, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 0xF).to(torch.uint8)


def check_options(
    options: Mapping[str, Any],
    where: str,
    *,
    bits: tuple[str, int],
    allowed: Mapping[str, Sequence[object]],
) -> None:
    """Check that values of `quantization_config` are allowed.

    Args:
        bits: the key of the width, and the only one.
        allowed: values by key; None among them: the key may be missing.

    Raises:
        CheckpointError: a value is another; file and key are named.
    """
    for key, values in {**allowed, bits[0]: (bits[1],)}.items():
        value = options.get(key)
        if not any(type(value) is type(v) and value == v for v in values):  # 0 is not False
            raise CheckpointError(
                f"{where}: quantization_config.{key} is {shown(repr(value))}, and only "
                f"{' or '.join(repr(v) for v in values if v is not None)} can be converted exactly"
            )


def check_groups(
    layer: str, place: TensorPlace, k: int, options: Mapping[str, Any], key: str, where: str
) -> int:
    """The group size from the config: the number of scales alone is ambiguous.

    Args:
        place: of the scales [groups, N].
        key: of the size among the options; -1 there is one group of all K columns.

    Raises:
        CheckpointError: the config has no such size, or the scales are of another; file, key and
            tensor are named.
    """
    size = options.get(key)
    if type(size) is not int or (size < 1 and size != -1):
        raise CheckpointError(
            f"{where}: quantization_config.{key} is {shown(repr(size))}; it must be the "
            "number of columns that share a scale, or -1 for all"
        )
    groups = 1 if size == -1 else num_groups(k, size)
    if place.shape[0] != groups:
        raise CheckpointError(
            f"{place.path}: {layer}.scales has {place.shape[0]} groups, and K = {k} in groups of "
            f"{size} makes {groups}: quantization_config.{key} in {where} contradicts it; give it "
            "the value that the file was quantized with"
        )
    return k if size == -1 else min(size, k)


def layer_parts(
    tensors: Mapping[str, TensorPlace], needed: Sequence[str], optional: Sequence[str], where: str
) -> dict[str, dict[str, TensorPlace]]:
    """The tensors of each packed layer by part.

    Raises:
        CheckpointError: one is there without the others, it is named with its file; or there is
            none at all, which a config of such layers contradicts.
    """
    found: dict[str, dict[str, TensorPlace]] = {}
    for name, place in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in (*needed, *optional):
            found.setdefault(layer, {})[part] = place
    if not found:
        raise CheckpointError(
            f"{where} has a quantization_config, and no tensor beside it is a {needed[0]}: its "
            "weights are not packed; remove quantization_config and run: fqcompile quantize "
            "CHECKPOINT OUT, or give the directory that it was written for"
        )
    for layer, places in found.items():
        missing = [part for part in needed if part not in places]
        if missing:
            part, place = next(iter(places.items()))
            raise CheckpointError(
                f"{place.path}: {layer}.{part} is there, {layer}.{missing[0]} is not"
            )
    return found


def check_part(
    layer: str,
    places: Mapping[str, TensorPlace],
    part: str,
    dtypes: Sequence[str],
    shape: tuple[int | None, int] | None = None,
) -> tuple[int, int]:
    """The shape of a matrix, which must be as expected; None: any size.

    Raises:
        CheckpointError: type or shape differ; file and tensor are named.
    """
    place = places[part]
    fits = len(place.shape) == 2 and min(place.shape) > 0 and place.dtype in dtypes
    if fits and shape is not None:
        fits = all(b in (None, a) for a, b in zip(place.shape, shape, strict=True))
    if not fits:
        wanted = "a matrix" if shape is None else f"{list(shape)}"
        raise CheckpointError(
            f"{place.path}: {layer}.{part} is {place.dtype} {list(place.shape)}; it must be "
            f"{' or '.join(dtypes)} {wanted}"
        )
    return place.shape[0], place.shape[1]
