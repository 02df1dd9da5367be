"""copy_ into a packed weight or whole rows of one: new values are quantized in the same format.

load_state_dict and loaders of fused projections write this way. The rest of the weight keeps its
codes, bit for bit. Writing a part of a row is refused, because the other part uses its scales.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fqcompile.errors import UnquantizableWeight
from fqcompile.kernels.registry import in_kernel_layout, in_plain_layout
from fqcompile.quant.choose import QuantPlan, quantize_weight, scale_dtype_beside
from fqcompile.tensor.format import PLAIN, Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.dense_view import DenseView, refusal
from fqcompile.weights.memory import Memory, values
from fqcompile.weights.parameter import PackedWeight

_COPY = "aten.copy_.default"


def write(w: PackedWeight | DenseView, source: Tensor) -> None:
    """Quantize the source into the part of the weight that w shows.

    Raises:
        FineQuantError: the source has another shape, or w shows only parts of some rows.
        UnquantizableWeight: the values cannot be quantized; the weight is unchanged.
    """
    if w.memory is None or (isinstance(w, PackedWeight) and w.ids is not None):
        raise refusal(_COPY, w)
    if type(w.memory.root.weight.qweight) is not Tensor:
        raise refusal(f"in a compiled graph, where values are not known, {_COPY}", w)
    source = source.shown if isinstance(source, DenseView) else source.detach()
    if not _can_fill(source, w):
        raise w.other_shape(source)
    if isinstance(w, PackedWeight) and isinstance(w.memory, Memory):
        _write_all(w, w.memory, source)
    elif w.numel():
        _write_rows(w, w.memory.root, source)


def _can_fill(source: Tensor, w: Tensor) -> bool:
    """Whether the source has the shape of w or broadcasts to it."""
    pairs = zip(reversed(source.shape), reversed(w.shape), strict=False)
    return source.dim() <= w.dim() and all(own in (1, size) for own, size in pairs)


def _write_all(w: PackedWeight, memory: Memory, source: Tensor) -> None:
    """Quantize the source into the whole weight; a packed source keeps its codes and format."""
    if _shows_rows_alike(source, w) and source.shape == w.shape:
        assert isinstance(source, PackedWeight)
        alike = (source.format, source.scale.dtype) == (w.format, w.scale.dtype)
        given = source if alike else source.to(w.device, w.dtype, copy=True)
        assert isinstance(given, PackedWeight)
        new = given.packed
    else:
        rows = _rows_of(_dense(source).expand(w.shape), w.format)
        plain = replace(w.format, layout=PLAIN)
        new = QuantizedTensor.of_rows(*_quantized(rows, w.format, w).tensors, plain)
        new = in_kernel_layout(new, w.dtype)
    memory.put(replace(new, format=new.format.flipped) if w.flipped else new)


def _write_rows(w: PackedWeight | DenseView, root: Memory, source: Tensor) -> None:
    form = root.weight.format
    dense = values(root, w.dtype)
    dense.as_strided(*w.place).copy_(_dense(source))
    marks = torch.zeros(form.shape, dtype=torch.bool, device=dense.device)
    marks.as_strided(*w.place).fill_(True)
    written = _rows_of(marks, form)
    rows = written.any(1)
    if not bool(written[rows].all()):
        raise refusal(f"{_COPY}: to a part of some rows it", w)
    new = _quantized(_rows_of(dense, form)[rows], form, w)
    if isinstance(w, PackedWeight) and _shows_rows_alike(source, w) and source.shape == w.shape:
        assert isinstance(source, PackedWeight)
        given = source.format
        if (given.qtype, given.group_size) == (form.qtype, form.group_size):
            new = source.quantized()
    root.put(in_kernel_layout(_replaced(in_plain_layout(root.weight), rows, new), w.dtype))


def _replaced(old: QuantizedTensor, rows: Tensor, new: QuantizedTensor) -> QuantizedTensor:
    """`old` with new codes and scales in the marked rows (of all experts)."""
    dtype = torch.promote_types(old.scale.dtype, new.scale.dtype)
    qweight, scale = old.as_rows()
    qweight, scale = qweight.clone(), scale.to(dtype, copy=True)
    codes, scales = new.as_rows()
    qweight[rows], scale[rows] = codes, scales.to(dtype)
    return QuantizedTensor.of_rows(qweight, scale, old.format)


def _shows_rows_alike(source: Tensor, w: PackedWeight) -> bool:
    """Whether the source is packed along the same dimension as w."""
    packed = isinstance(source, PackedWeight) and source.ids is None
    return packed and source.format.transposed == w.format.transposed  # type: ignore[attr-defined]


def _dense(source: Tensor) -> Tensor:
    return source.dequantized() if isinstance(source, PackedWeight) else source


def _rows_of(shown: Tensor, form: Format) -> Tensor:
    """The rows of `shown`: [N, K], or [E * N, K] for a stack."""
    return (shown.transpose(-2, -1) if form.transposed else shown).reshape(-1, form.k)


def _quantized(rows: Tensor, form: Format, w: PackedWeight | DenseView) -> QuantizedTensor:
    """The rows quantized in the format `form`, on the device of w."""
    assert w.memory is not None
    scale_dtype = w.memory.root.weight.scale.dtype
    if scale_dtype == torch.float32:  # the old values may have needed it, the new ones not
        scale_dtype = scale_dtype_beside(w.dtype)
    plan = QuantPlan.of(form, scale_dtype)
    try:
        return quantize_weight(rows.to(w.device), plan)
    except UnquantizableWeight as error:
        raise UnquantizableWeight(
            f"copy_ into a packed weight{_named(w)}: {error}; the weight is as it was, and "
            "fqcompile.restore(model) makes it dense, where any values can be written"
        ) from error


def _named(w: PackedWeight | DenseView) -> str:
    name = w.memory.name if w.memory is not None else ""
    return f", {name}," if name else ""
