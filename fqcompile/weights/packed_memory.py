"""PackedMemory: codes and scales that a packed weight and its views share; MemoryPart: some of it.

A write replaces or overwrites them here, so every view shows it, whatever their new format.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, count
from operator import mul
from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from fqcompile.kernels.op import dequantize
from fqcompile.kernels.registry import LAYOUTS
from fqcompile.kernels.template import PackedLinear
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.packed_form import PackedForm
from fqcompile.weights.stacks import unpack_stack

_numbers = count(1)


class Place(NamedTuple):
    """Where a view's elements are in the weight that was packed, as `torch.as_strided` takes it."""

    size: Sequence[int]
    stride: Sequence[int]
    offset: int | SymInt = 0


def whole_place(size: Sequence[int]) -> Place:
    """That of a weight which is contiguous."""
    lengths = [max(length, 1) for length in size[:0:-1]]
    return Place(size, tuple(accumulate(lengths, mul, initial=1))[::-1])


class PackedMemory:
    """Codes and scales of a whole weight.

    Attributes:
        qweight, scale: in the layout that `form` names.
        form: as the weight that was packed shows its matrices.
        name: of the parameter, for messages; "" where it is not known.
        number: of the values. No two memories have the same, and a write gives a new one.
    """

    __slots__ = ("form", "name", "number", "qweight", "scale")

    def __init__(self, qweight: Tensor, scale: Tensor, form: PackedForm, name: str = "") -> None:
        self.qweight, self.scale, self.form, self.name = qweight, scale, form, name
        self.number = next(_numbers)

    @property
    def root(self) -> "PackedMemory":
        return self

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def put(self, qweight: Tensor, scale: Tensor, form: PackedForm) -> None:
        """Other values: in the same memory where they fit, as compiled graphs hold it.

        Else the tensors given become the memory.
        """
        fit = (form, scale.dtype, scale.device) == (self.form, self.scale.dtype, self.scale.device)
        self.number = next(_numbers)  # who reads meanwhile, and looks again, sees that it changed
        if fit:
            self.qweight.copy_(qweight)
            self.scale.copy_(scale)
        else:
            self.qweight, self.scale, self.form = qweight, scale, form
        self.number = next(_numbers)


class MemoryPart:
    """Rows of a matrix or one expert: `take` makes them, again after each write to the whole."""

    __slots__ = ("_number", "_take", "_taken", "whole")

    def __init__(
        self,
        whole: "PackedMemory | MemoryPart",
        take: Callable[["PackedMemory | MemoryPart"], PackedMemory],
    ) -> None:
        # At once: where a graph is traced, what is made later would be made outside of it.
        self.whole, self._take = whole, take
        self._taken, self._number = take(whole), whole.number

    def _now(self) -> PackedMemory:
        number = self.whole.number
        if number != self._number:
            self._taken, self._number = self._take(self.whole), number
        return self._taken

    @property
    def qweight(self) -> Tensor:
        return self._now().qweight

    @property
    def scale(self) -> Tensor:
        return self._now().scale

    @property
    def form(self) -> PackedForm:
        return self._now().form

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def number(self) -> int:
        return self.whole.number

    @property
    def root(self) -> PackedMemory:
        return self.whole.root

    @property
    def device(self) -> torch.device:
        return self.whole.device


Memory = PackedMemory | MemoryPart


def quantized(memory: Memory) -> QuantizedWeight:
    """Plain codes and scales, rows [N, K] or [E * N, K]."""
    f = memory.form
    packed = PackedLinear(memory.qweight, memory.scale, f.bits, f.group_size, f.rows, f.k)
    return unpack_stack(packed, f.experts, LAYOUTS[f.layout])


def matrices(memory: Memory, dtype: torch.dtype) -> Tensor:
    """ŵ [N, K] or [E, N, K], by the operator that knows the layout."""
    form, qweight, scale = memory.form, memory.qweight, memory.scale
    formats = (form.bits, form.group_size, form.rows, form.k, dtype, form.reader)
    if not form.experts:
        matrix: Tensor = dequantize(qweight, scale, *formats)
        return matrix
    pairs = zip(qweight.unbind(), scale.unbind(), strict=True)
    return torch.stack([dequantize(*pair, *formats) for pair in pairs])


def values(memory: Memory, dtype: torch.dtype) -> Tensor:
    """The dense weight in the shape of the one that was packed, contiguous as that was."""
    w_hat = matrices(memory, dtype)
    return w_hat.transpose(-2, -1).contiguous() if memory.form.transposed else w_hat
