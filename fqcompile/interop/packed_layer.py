"""PackedLayer: a quantised layer of somebody else's checkpoint, not read yet; checks and codes.

GPTQ and AWQ alike have matrices [K, N] of 4-bit codes in int32 words, with zero points; their
readers share checks of config keys, of the tensors of a layer, and of its groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fqcompile.checkpoint.json_text import shown
from fqcompile.checkpoint.safetensors_file import TensorPlace
from fqcompile.errors import CheckpointError
from fqcompile.tensor.codes import pack
from fqcompile.tensor.format import QTYPES, Format, num_groups
from fqcompile.tensor.quantized import QuantizedTensor


@dataclass(frozen=True)
class PackedLayer:
    """`read` gives rows [N, K]; `places` are the files' tensors that it is made of."""

    name: str
    n: int
    k: int
    places: Mapping[str, TensorPlace]
    read: Callable[[], QuantizedTensor]

    @property
    def scale_dtype(self) -> str:
        """By its name in safetensors."""
        return next(p.dtype for part, p in self.places.items() if "scale" in part)


def symmetric(
    codes: Tensor, zeros: Tensor, scale: Tensor, group_size: int, where: str
) -> QuantizedTensor:
    """(q - z) * s as codes q - z: as int4 where all fit, else as int8, which is exact too.

    Args:
        codes: q, int8 or int16 [N, K]. zeros: z [N, groups] of the same convention. scale: s.
        where: file and layer, for errors.

    Raises:
        CheckpointError: a difference fits no int8.
    """
    n, k = codes.shape
    spread = zeros.to(torch.int16).repeat_interleave(group_size, 1)[:, :k]
    difference = codes.to(torch.int16) - spread
    low, high = int(difference.min()), int(difference.max())
    qtype = next((q for q in QTYPES.values() if q.qmin <= low and high <= q.qmax), None)
    if qtype is None:
        raise CheckpointError(
            f"{where}: codes less zero points reach from {low} to {high}, which no int8 holds: it "
            "cannot be converted exactly; quantise it symmetrically"
        )
    qweight = pack(difference.to(torch.int8), qtype)
    form = Format(qtype.bits, min(group_size, k), n, k)
    return QuantizedTensor(qweight, scale.contiguous(), form)


CODES_PER_WORD = 8
BITS = 4
MIDDLE = 8  # the zero point of symmetric codes


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
    """The values of `quantization_config` are among those allowed.

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
    """Columns in a group, as the config says: the number of scales alone leaves several open.

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
