"""PackedForm: how a packed weight's codes and scales are read, and which kernels can read them."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from fqcompile.kernels.registry import TEMPLATES, select_kernel
from fqcompile.kernels.spec import GemmSpec, gpu_of
from fqcompile.kernels.template import PLAIN, Layout

Routed = Literal["grouped", "gathered"]  # how rows are told their experts


@dataclass(frozen=True)
class PackedForm:
    """How to read the two tensors.

    Attributes:
        rows, k: of the matrix, or of one of `experts` matrices (0: there is no stack).
        transposed: the tensor is the matrices' transpose, [K, N] or [E, K, N].
        scale_method: how scales were chosen; new values that are copied in are quantised so.
        layout: the name of the order in memory.
    """

    bits: int
    group_size: int
    rows: int
    k: int
    experts: int = 0
    transposed: bool = False
    scale_method: str = "mse"
    layout: str = PLAIN.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        matrix = (self.k, self.rows) if self.transposed else (self.rows, self.k)
        return (self.experts, *matrix) if self.experts else matrix

    @cached_property
    def flipped(self) -> "PackedForm":
        """Of the transpose, in the same memory."""
        return replace(self, transposed=not self.transposed)

    @cached_property
    def one(self) -> "PackedForm":
        """Of one expert."""
        return replace(self, experts=0)

    @property
    def reader(self) -> str:
        """A kernel that knows the layout."""
        return next(t.name for t in TEMPLATES.values() if t.layout.name == self.layout)


def best_layout(
    form: PackedForm, dtype: torch.dtype, scale_dtype: torch.dtype, device: torch.device
) -> Layout:
    """That of the kernel which runs a weight of this form here; it can be undone."""
    spec = spec_of(form, dtype, scale_dtype, device, None)
    return select_kernel(spec).template.layout


def spec_of(
    form: PackedForm,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    routing: Routed | None,
) -> GemmSpec:
    """Any number of rows of x; experts without a routing as grouped ones."""
    return GemmSpec(
        m=1,
        n=form.rows,
        k=form.k,
        bits=form.bits,
        group_size=form.group_size,
        dtype=dtype,
        scale_dtype=scale_dtype,
        device_type=device.type,
        needs_backward=True,
        m_range=(0, None),
        gpu=gpu_of(device) if device.type == "cuda" and torch.cuda.is_available() else None,
        experts=form.experts,
        routing=(routing or "grouped") if form.experts else None,
    )
