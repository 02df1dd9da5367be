"""Assemble packed layers of a checkpoint into one weight of the model: stacked experts, gate_up.

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
