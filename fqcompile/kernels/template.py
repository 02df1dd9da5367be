"""Template: one way to run a quantized matmul: its conditions, layout, configurations, kernel.

`DEQUANTIZE` is the one that always works: dequantize the weight, then let PyTorch multiply.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from fqcompile.kernels.cpu.huge_pages import beside_others, in_huge_pages
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import Config, GemmSpec, LaunchTable
from fqcompile.tensor import format as formats
from fqcompile.tensor.codes import dequantize_rows
from fqcompile.tensor.format import QTYPES, UNIFORM, num_groups, packed_columns
from fqcompile.tensor.quantized import QuantizedTensor

PackedTensors = tuple[torch.Tensor, torch.Tensor]
Shape = tuple[int, ...]
SearchMode = Literal["fast", "max"]
# Weights dequantized at a time: they are multiplied while in the cache, and no large buffer is
# mapped anew on every call. Measured, 4096 x 4096, int4, M = 1, fp32: 9 ms against 35.
_CPU_CHUNK = 1 << 21
MOST_GATHERED = 2  # rows of an expert, on average, that GPU kernels do not sort by expert


class Routing(NamedTuple):
    """Which rows of x go to which expert: exactly one of the two is given, of int32 or int64.

    offsets [E]   x is sorted by expert: expert e has the rows offsets[e-1] to offsets[e]; those
                  from the last offset on belong to no expert and are neither read nor written
    ids [M]       row m goes to expert ids[m]; a negative id counts from the last one, as in W[ids]
    """

    offsets: torch.Tensor | None = None
    ids: torch.Tensor | None = None

    def rows_of_experts(self, experts: int, m: int) -> Iterator[tuple[int, slice | torch.Tensor]]:
        """Each expert that has rows, with its rows. Reads the routing on the host.

        Raises:
            IndexError: an id names no expert, or offsets fall or pass the rows there are.
        """
        if self.offsets is not None:
            yield from _runs(self.offsets.tolist(), m)
            return
        assert self.ids is not None
        rows: dict[int, list[int]] = {}
        for row, index in enumerate(self.ids.tolist()):
            if not -experts <= index < experts:
                raise IndexError(
                    f"ids[{row}] is {index}; the weight has {experts} experts, so ids must be from "
                    f"{-experts} to {experts - 1}"
                )
            rows.setdefault(index % experts, []).append(row)
        for expert, own in sorted(rows.items()):
            yield expert, _as_rows(own)


def _runs(ends: list[int], m: int) -> Iterator[tuple[int, slice]]:
    bounds = [0, *ends]
    falls = next((i for i, (a, b) in enumerate(pairwise(bounds)) if b < a), None)
    if falls is not None or bounds[-1] > m:
        where = f"offsets[{falls}] falls" if falls is not None else f"the last is over {m}"
        raise IndexError(
            f"offsets must rise from 0 to at most the {m} rows of x; {where} in {ends}"
        )
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield expert, slice(start, end)


def _as_rows(rows: list[int]) -> slice | torch.Tensor:
    """A slice where the rows are neighbors: reading one makes no copy."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows)


class Run(Protocol):
    """`act(x @ ŵᵀ + bias) + residual` for x [M, K] with M >= 1; returns [M, N] in x's dtype.

    With a routing the weight is a stack of experts, the bias [E, rows of one], and there is no
    residual: `act(x[m] @ ŵ[e(m)]ᵀ + bias[e(m)])`. Experts without rows are not read, rows without
    an expert are not written. The operator has checked all sizes and types (see `kernels.run`).
    """

    def __call__(
        self,
        x: torch.Tensor,
        weight: QuantizedTensor,
        routing: Routing | None,
        epilogue: Epilogue,
        config: Config | None,
    ) -> torch.Tensor: ...


_NO_ROW = 1 << 40  # rows that only fill up a block are none either
Multiply = Callable[[torch.Tensor, QuantizedTensor, Epilogue], torch.Tensor]


def one_by_one(multiply: Multiply) -> Run:
    """Run experts with a kernel for one matrix without configurations, expert by expert."""

    def run(
        x: torch.Tensor,
        weight: QuantizedTensor,
        routing: Routing | None,
        epilogue: Epilogue,
        config: Config | None,
    ) -> torch.Tensor:
        if routing is None:
            return multiply(x, weight, epilogue)
        bias = epilogue.bias
        y = x.new_empty(x.shape[0], epilogue.columns(weight.format.rows))
        for expert, rows in routing.rows_of_experts(weight.qweight.shape[0], x.shape[0]):
            own = epilogue._replace(bias=None if bias is None else bias[expert])
            y[rows] = multiply(x[rows], weight.expert(expert), own)
        return y

    return run


@dataclass(frozen=True)
class Layout:
    """How a kernel wants codes and scales in memory; `pack` makes it from the plain one.

    `shapes(bits, group_size, rows, k)` are those of what `pack_matrix` makes; kernels read no
    others. `unpack_matrix` gives the plain one back, bit for bit; `dequantize` gives ŵ [rows, K] in
    a dtype; `rows` gives some rows, in this layout, whose codes are a view, or None where these
    rows have none; `gather` gives the rows of int64 ids [P], in the plain layout. All take one
    matrix, and are None where nothing can. The name carries the
    layout's version, since packed tensors and tuned tables are found by it.
    """

    name: str
    pack_matrix: Callable[[QuantizedTensor], PackedTensors]
    shapes: Callable[[int, int, int, int], tuple[Shape, Shape]]
    dequantize: Callable[[QuantizedTensor, torch.dtype], torch.Tensor] | None = None
    unpack_matrix: Callable[[QuantizedTensor], PackedTensors] | None = None
    rows: Callable[[QuantizedTensor, int, int], PackedTensors | None] | None = None
    gather: Callable[[QuantizedTensor, torch.Tensor], PackedTensors] | None = None

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
        qweight, scale = beside_others(qweight), beside_others(scale)
        return QuantizedTensor(qweight, scale, replace(weight.format, layout=self.name))

    def unpack(self, weight: QuantizedTensor) -> QuantizedTensor:
        """Undo `pack`, bit for bit."""
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

    def take(self, weight: QuantizedTensor, ids: torch.Tensor) -> QuantizedTensor:
        """The rows of a matrix that ids [P] of int32 or int64 name, in the plain layout.

        Raises:
            IndexError: an id names no row; on a GPU the kernel fails that reads it.
        """
        assert self.gather is not None, f"no rows can be taken from layout {self.name}"
        inside = (ids >= 0) & (ids < weight.rows)
        if ids.is_cpu and not inside.all():
            outside = int(ids[~inside][0])
            raise IndexError(f"row {outside} is out of range: the weight has {weight.rows} rows")
        ids = torch.where(inside, ids.long(), _NO_ROW)
        form = replace(weight.format, rows=len(ids), layout=formats.PLAIN)
        return QuantizedTensor(*self.gather(weight, ids), form)


def plain_shapes(bits: int, group_size: int, rows: int, k: int) -> tuple[Shape, Shape]:
    """A row of bytes and its scales for each row."""
    return (rows, packed_columns(QTYPES[bits, UNIFORM], k)), (rows, num_groups(k, group_size))


def dequantize_plain(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """ŵ [rows, K] in `dtype`, from the plain layout."""
    f = weight.format
    return dequantize_rows(weight.qweight, weight.scale, f.qtype, f.group_size, f.k, dtype)


def _same(weight: QuantizedTensor) -> PackedTensors:
    return weight.tensors


PLAIN = Layout(
    formats.PLAIN,
    _same,
    plain_shapes,
    dequantize_plain,
    _same,
    lambda weight, start, rows: weight.narrow(start, rows).tensors,
    lambda weight, ids: (weight.qweight[ids], weight.scale[ids]),
)


class Candidates(Protocol):
    """Configurations worth measuring, at most 12 in mode "fast".

    For `m` rows, where that of `launches` comes first; or for a configuration that serves `fewest`
    to `m` rows and is measured at both.
    """

    def __call__(
        self, spec: GemmSpec, m: int, mode: SearchMode, fewest: int | None = None
    ) -> Sequence[Config]: ...


def nothing_to_search(
    spec: GemmSpec, m: int, mode: SearchMode, fewest: int | None = None
) -> Sequence[Config]:
    """The candidates of a kernel that has no configuration."""
    return ()


@dataclass(frozen=True)
class Template:
    """A kernel family.

    Attributes:
        refuse: pure and total: None where the template can run the spec, else the reason it cannot.
        launches: the configurations without measuring (None: nothing to configure).
        run: runs it, for one matrix or for experts; `one_by_one` makes it of a kernel for one.
        candidates: configurations worth measuring, see `Candidates`.
    """

    name: str
    layout: Layout
    refuse: Callable[[GemmSpec], str | None]
    launches: Callable[[GemmSpec], LaunchTable | None]
    run: Run
    candidates: Candidates = nothing_to_search


def multiply_dequantized(
    x: torch.Tensor, weight: QuantizedTensor, epilogue: Epilogue
) -> torch.Tensor:
    """`act(x @ ŵᵀ + bias) + residual` [M, N] for one matrix in the plain layout."""
    bias, n = epilogue.bias, weight.format.rows
    step = max(1, _CPU_CHUNK // max(1, weight.format.k))
    if x.device.type != "cpu" or n <= step:
        z = F.linear(x, dequantize_plain(weight, x.dtype), bias)
    else:
        z = x.new_empty(x.shape[0], n)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            w_hat = dequantize_plain(weight.narrow(start, rows.stop - start), x.dtype)
            z[:, rows] = F.linear(x, w_hat, None if bias is None else bias[rows])
    return epilogue.apply_to_biased(z)


def _refuse(spec: GemmSpec) -> str | None:
    return None


DEQUANTIZE = Template(
    "dequantize", PLAIN, _refuse, lambda spec: None, one_by_one(multiply_dequantized)
)
