"""Packed layers of a checkpoint: checked, and assembled into weights of the model.

Several layers may be one weight there: stacked experts, gate_up.

The converters of transformers are run on row numbers instead of weights, which gives the order of
the rows; rows of codes and scales are then arranged accordingly. If the layers differ, scales are
repeated to the finest group size, and int4 codes are widened to int8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fqcompile.checkpoint.conversion import Conversion
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import TensorPlace
from fqcompile.files.untrusted import shown
from fqcompile.quant.granularity import group_size_candidates
from fqcompile.tensor.codes import pack, unpack
from fqcompile.tensor.format import INT4, INT8, QTYPES, UNIFORM, Format, num_groups, packed_columns
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.tensor.words import widen
from fqcompile.weights.parameter import PackedWeight


@dataclass(frozen=True)
class ForeignLayer:
    """A packed layer; `read` returns rows [N, K]; `places` are its tensors in the files."""

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
    """Codes q - z of (q - z) * s: int4 if all of them fit, else int8; both are exact.

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
    qtype = next((q for q in (INT4, INT8) if q.qmin <= low and high <= q.qmax), None)
    if qtype is None:
        raise CheckpointError(
            f"{where}: codes less zero points reach from {low} to {high}, which no int8 holds: it "
            "cannot be converted exactly; quantize it symmetrically"
        )
    qweight = pack(difference.to(torch.int8), qtype)
    form = Format(qtype.bits, min(group_size, k), n, k)
    return QuantizedTensor(qweight, scale.contiguous(), form)


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


def assemble(
    step: Conversion, model: Any, layers: Mapping[str, ForeignLayer], dtype: torch.dtype
) -> PackedWeight:
    """Assemble the layers of a step into the model's weight.

    Args:
        layers: by the weight names that the step uses.
        dtype: dtype of the dense weight.

    Raises:
        CheckpointError: the model has no weight [.., N, K] with these rows there.
    """
    own = [layers[name] for name in step.names]
    order, experts, transposed = _row_order(step, model, own)
    whole = restored(_gathered(own, order))
    rows = whole.rows // max(1, experts)
    form = replace(whole.format, rows=rows, experts=experts, transposed=transposed)
    return PackedWeight.of(QuantizedTensor.of_rows(*whole.tensors, form), dtype)


def _row_order(
    step: Conversion, model: Any, own: Sequence[ForeignLayer]
) -> tuple[Tensor, int, bool]:
    """Source row of each row of the result; number of experts; whether the model has [K, N]."""
    numbers, start = {}, 0
    for name, layer in zip(step.names, own, strict=True):
        numbers[name] = torch.arange(start, start + layer.n, dtype=torch.int32)[:, None]
        start += layer.n
    found = step.run(model, numbers.__getitem__)
    target, rows = next(iter(found.items()))
    transposed = rows.shape[-1] != 1
    matrix = rows.mT if transposed else rows
    shape = tuple(model.state_dict()[target].shape)
    expected = (*matrix.shape[:-1], own[0].k)
    if _is_conv1d(model, target):
        transposed = True
    expected = (*expected[:-2], expected[-1], expected[-2]) if transposed else expected
    if len(found) != 1 or shape != expected or rows.numel() != start:
        raise CheckpointError(
            f"{step.names[0]} is packed, and {target} {list(shape)} of {type(model).__name__} is "
            f"no weight of {start} rows of {own[0].k}"
        )
    return matrix.flatten(), shape[0] if len(shape) == 3 else 0, transposed


def _is_conv1d(model: Any, name: str) -> bool:
    """Whether it is GPT-2's Conv1D, which holds [K, N]; GPTQ and AWQ pack it like other layers."""
    module = model.get_submodule(name.rpartition(".")[0])
    return type(module).__name__ == "Conv1D"


def _gathered(own: Sequence[ForeignLayer], order: Tensor) -> QuantizedTensor:
    """The layers' rows in that order."""
    waiting = [layer.read() for layer in own]
    if len(waiting) == 1 and torch.equal(order, torch.arange(len(order), dtype=order.dtype)):
        return waiting[0]
    bits, size, dtype = _common(own, waiting)
    k, rows = own[0].k, len(order)
    places = torch.empty(rows, dtype=torch.long)
    places[order.long()] = torch.arange(rows)
    qtype = QTYPES[bits, UNIFORM]
    qweight = torch.empty(rows, packed_columns(qtype, k), dtype=qtype.storage_dtype)
    scale = torch.empty(rows, num_groups(k, size), dtype=dtype)
    for target in places.split([layer.n for layer in own]):
        weight = waiting.pop(0)
        weight = (weight if weight.bits == bits else widen(weight)).regroup(size)
        qweight[target], scale[target] = weight.qweight, weight.scale.to(dtype)
    return QuantizedTensor(qweight, scale, Format(bits, size, rows, k))


def _common(
    own: Sequence[ForeignLayer], weights: Sequence[QuantizedTensor]
) -> tuple[int, int, torch.dtype]:
    """Bits, group size and scale dtype that can represent all of the layers."""
    k, names = {layer.k for layer in own}, f"{own[0].name} ... {own[-1].name}"
    if len(k) > 1:
        raise CheckpointError(f"{names} are one weight in the model, and have K of {sorted(k)}")
    sizes = sorted({weight.group_size for weight in weights})
    if any(size % sizes[0] and size < own[0].k for size in sizes):
        raise CheckpointError(
            f"{names} are one weight in the model, and have groups of {sizes}, which have no "
            "common part"
        )
    dtypes = {weight.scale.dtype for weight in weights}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return max(weight.bits for weight in weights), sizes[0], dtype


def restored(weight: QuantizedTensor) -> QuantizedTensor:
    """In the coarsest groups and fewest bits that hold its values: export may have repeated."""
    k, own = weight.k, weight.group_size
    for size in group_size_candidates(k, own):
        if size > own and (size == k or size % own == 0):
            coarse = weight.coarsen(size)
            if torch.equal(coarse.regroup(own).scale, weight.scale):
                weight = coarse
                break
    if weight.bits == INT8.bits:
        low, high = weight.qweight.aminmax()
        if low >= INT4.qmin and high <= INT4.qmax:
            codes = pack(unpack(weight.qweight, INT8, k), INT4)
            weight = replace(weight, qweight=codes).changed(bits=INT4.bits)
    return weight
