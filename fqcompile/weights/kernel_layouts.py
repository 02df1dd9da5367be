"""Convert packed weights into the layout of the kernel that runs them here, and back."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fqcompile.errors import NoKernelError
from fqcompile.kernels.op import dequantize
from fqcompile.kernels.registry import LAYOUTS, TEMPLATES, KernelChoice, select_kernel
from fqcompile.kernels.spec import GemmSpec, gpu_of
from fqcompile.kernels.tuning.launches import tuned_launches
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor

Routed = Literal["grouped", "gathered"]  # how rows are told their experts


def in_kernel_layout(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """From the plain layout to that of the kernel which runs it here for activations of `dtype`."""
    spec = spec_of(weight.format, dtype, weight.scale.dtype, weight.qweight.device, None)
    return select_kernel(spec).template.layout.pack(weight)


def in_plain_layout(weight: QuantizedTensor) -> QuantizedTensor:
    """The plain layout again, bit for bit."""
    return LAYOUTS[weight.format.layout].unpack(weight)


def matrices(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """ŵ [N, K] or [E, N, K], by the operator that knows the layout."""
    f, kernel = weight.format, reader(weight.format)
    each = weight.unbind() if f.experts else [weight]
    found = [
        dequantize(*one.tensors, f.bits, f.levels, f.group_size, f.rows, f.k, dtype, kernel)
        for one in each
    ]
    return torch.stack(found) if f.experts else found[0]


def reader(format: Format) -> str:
    """A kernel that knows the layout."""
    return next(t.name for t in TEMPLATES.values() if t.layout.name == format.layout)


@cache
def kernel_for(
    format: Format,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    routing: Routed | None,
) -> str | None:
    """The operator's `kernel`, for any number of rows; None where nothing reads that layout."""
    spec = spec_of(format, dtype, scale_dtype, device, routing)
    try:
        choice = select_kernel(spec, format.layout)
    except NoKernelError:
        return None
    return str(KernelChoice(choice.template, tuned_launches(spec, choice.template, "off").launches))


def spec_of(
    format: Format,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    routing: Routed | None,
) -> GemmSpec:
    """Any number of rows of x; experts without a routing as grouped ones."""
    return GemmSpec(
        m=1,
        n=format.rows,
        k=format.k,
        bits=format.bits,
        levels=format.levels,
        group_size=format.group_size,
        dtype=dtype,
        scale_dtype=scale_dtype,
        device_type=device.type,
        needs_backward=True,
        m_range=(0, None),
        gpu=gpu_of(device) if device.type == "cuda" and torch.cuda.is_available() else None,
        experts=format.experts,
        routing=(routing or "grouped") if format.experts else None,
    )
