"""Template: one way to run a quantised matmul, as a value to ask and to call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch

from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.kernels.launch_table import Config, LaunchTable
from fqcompile.kernels.spec import GemmSpec
from fqcompile.tensor import format as formats
from fqcompile.tensor.codes import dequantize_rows
from fqcompile.tensor.format import QTYPES, num_groups, packed_columns
from fqcompile.tensor.quantized import QuantizedTensor

PackedTensors = tuple[torch.Tensor, torch.Tensor]
Shape = tuple[int, ...]
SearchMode = Literal["fast", "max"]


class PackedLinear(NamedTuple):
    """A packed weight with its format, as the op received it. qweight and scale follow `layout`.

    Of a stack of experts, both have one more dimension in front, and `rows` are those of one.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    bits: int
    group_size: int
    rows: int
    k: int


class LinearFn(Protocol):
    """`act(x @ ŵᵀ + bias) + residual` for x [M, K] with M >= 1; returns [M, N] in x's dtype.

    The residual [M, N] has x's dtype too; the operator sees to it (see `arguments`).
    """

    def __call__(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: str,
        gated: bool,
        config: Config | None,
    ) -> torch.Tensor: ...


class ExpertsFn(Protocol):
    """`act(x[m] @ ŵ[e(m)]ᵀ + bias[e(m)])` for x [M, K] with M >= 1; returns [M, N] in x's dtype.

    Row m's expert e(m) is told by offsets or by ids, see `routing`; bias is [E, rows of one].
    Experts without rows are not read; rows without an expert are not written.
    """

    def __call__(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        offsets: torch.Tensor | None,
        ids: torch.Tensor | None,
        bias: torch.Tensor | None,
        activation: str,
        gated: bool,
        config: Config | None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Layout:
    """How a kernel wants codes and scales in memory; `pack` makes it from the plain one.

    `shapes(bits, group_size, rows, k)` are those of what `pack_matrix` makes; kernels read no
    others. `unpack_matrix` gives the plain one back, bit for bit; `dequantize` gives ŵ [rows, K] in
    a dtype; `rows` gives some rows, in this layout, whose codes are a view, or None where these
    rows have none. All take one matrix, and are None where nothing can. The name carries the
    layout's version, since packed tensors and tuned tables are found by it.
    """

    name: str
    pack_matrix: Callable[[QuantizedTensor], PackedTensors]
    shapes: Callable[[int, int, int, int], tuple[Shape, Shape]]
    dequantize: Callable[[PackedLinear, torch.dtype], torch.Tensor] | None = None
    unpack_matrix: Callable[[QuantizedTensor], PackedTensors] | None = None
    rows: Callable[[QuantizedTensor, int, int], PackedTensors | None] | None = None

    def pack(self, weight: QuantizedTensor) -> QuantizedTensor:
        """The weight, which is in the plain layout, in this one; a stack expert by expert."""
        assert weight.format.layout == formats.PLAIN, f"packed as {weight.format.layout} already"
        if self.name == formats.PLAIN:
            return weight
        experts = weight.unbind() if weight.format.experts else [weight]
        # Into one tensor each from the start: a second copy of all experts would be large.
        qweight, scale = first = self.pack_matrix(experts[0])
        if weight.format.experts:
            qweight, scale = (in_huge_pages(t.new_empty((len(experts), *t.shape))) for t in first)
            for i, expert in enumerate(experts):
                qweight[i], scale[i] = self.pack_matrix(expert)
        return QuantizedTensor(qweight, scale, replace(weight.format, layout=self.name))

    def unpack(self, weight: QuantizedTensor) -> QuantizedTensor:
        """What `pack` was given, bit for bit."""
        assert self.unpack_matrix is not None, f"layout {self.name} cannot be undone"
        if self.name == formats.PLAIN:
            return weight
        if weight.format.experts:
            return QuantizedTensor.stack([self.unpack(one) for one in weight.unbind()])
        form = replace(weight.format, layout=formats.PLAIN)
        return QuantizedTensor(*self.unpack_matrix(weight), form)

    def narrow(self, weight: QuantizedTensor, start: int, rows: int) -> QuantizedTensor | None:
        """Rows of a matrix in this layout, whose codes are a view; None where there is none."""
        found = None if self.rows is None else self.rows(weight, start, rows)
        return found and QuantizedTensor(*found, replace(weight.format, rows=rows))


def plain_shapes(bits: int, group_size: int, rows: int, k: int) -> tuple[Shape, Shape]:
    """A row of bytes and its scales for each row."""
    return (rows, packed_columns(QTYPES[bits], k)), (rows, num_groups(k, group_size))


def dequantize_plain(weight: PackedLinear, dtype: torch.dtype) -> torch.Tensor:
    """ŵ [rows, K] in `dtype`, from the plain layout."""
    return dequantize_rows(
        weight.qweight, weight.scale, weight.bits, weight.group_size, weight.k, dtype
    )


def _same(weight: QuantizedTensor) -> PackedTensors:
    return weight.tensors


PLAIN = Layout(
    formats.PLAIN,
    _same,
    plain_shapes,
    dequantize_plain,
    _same,
    lambda weight, start, rows: weight.narrow(start, rows).tensors,
)


def nothing_to_search(spec: GemmSpec, m: int, mode: SearchMode) -> Sequence[Config]:
    """The candidates of a kernel that has no configuration."""
    return ()


@dataclass(frozen=True)
class Template:
    """A kernel family.

    Attributes:
        refuse: pure and total: None where the template can run the spec, else the reason it cannot.
        launches: the configurations without measuring (None: nothing to configure).
        linear: runs it.
        candidates: configurations worth measuring for M rows, the one of `launches` first; at most
            12 in mode "fast".
        experts: runs it for experts; None where the template has one matrix alone.
    """

    name: str
    layout: Layout
    refuse: Callable[[GemmSpec], str | None]
    launches: Callable[[GemmSpec], LaunchTable | None]
    linear: LinearFn
    candidates: Callable[[GemmSpec, int, SearchMode], Sequence[Config]] = nothing_to_search
    experts: ExpertsFn | None = None
