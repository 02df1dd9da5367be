"""A weight matrix as packed codes and scales: w ≈ q * scale (see affine.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from fqcompile.tensor.chunks import plain_tensors
from fqcompile.tensor.codes import dequantize_rows
from fqcompile.tensor.format import num_groups


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes in the plain layout (see packing.py), scales [N, G], and how to read them.

    `group_size` is K for one scale per column. `==` is identity, as for modules.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    bits: int
    group_size: int
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.qweight.nbytes + self.scale.nbytes

    @plain_tensors()
    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """ŵ [N, K] in `dtype`."""
        k = self.shape[1]
        return dequantize_rows(self.qweight, self.scale, self.bits, self.group_size, k, dtype)

    @plain_tensors()
    def regroup(self, group_size: int) -> Self:
        """The same values under a finer group size: scales are repeated, codes are shared."""
        k = self.shape[1]
        if group_size == self.group_size:
            return self
        one_group = self.group_size >= k
        if group_size < 1 or (self.group_size % group_size and not one_group):
            raise ValueError(
                f"group_size {group_size} does not divide the group size {self.group_size} of a "
                f"weight of K = {k}; regroup to a divisor of {self.group_size}"
            )
        groups = num_groups(k, group_size)
        repeats = groups if one_group else self.group_size // group_size
        # The repeats of a short last group reach beyond K.
        scale = self.scale.repeat_interleave(repeats, 1)[:, :groups].contiguous()
        return type(self)(self.qweight, scale, self.bits, min(group_size, k), self.shape)

    @plain_tensors()
    def coarsen(self, group_size: int) -> Self:
        """What `regroup` came from: of the repeated scales every group keeps its first."""
        k = self.shape[1]
        step = self.scale.shape[1] if group_size >= k else group_size // self.group_size
        scale = self.scale[:, ::step].contiguous()
        return type(self)(self.qweight, scale, self.bits, group_size, self.shape)

    def narrow(self, start: int, rows: int) -> Self:
        """The rows from `start` on; views."""
        qweight, scale = self.qweight.narrow(0, start, rows), self.scale.narrow(0, start, rows)
        return type(self)(qweight, scale, self.bits, self.group_size, (rows, self.shape[1]))

    def split(self, experts: int) -> list[Self]:
        """The matrices of a stack whose rows [E * N, K] these are; views."""
        rows = self.shape[0] // experts
        return [self.narrow(expert * rows, rows) for expert in range(experts)]

    @plain_tensors()
    def gate_then_up(self, experts: int = 1) -> Self:
        """Each expert's rows 0, 2, 4, ... before its rows 1, 3, 5, ..."""

        def move(rows: torch.Tensor) -> torch.Tensor:
            pairs = rows.view(experts, -1, 2, rows.shape[1])
            return pairs.transpose(1, 2).reshape(rows.shape)

        moved = move(self.qweight), move(self.scale)
        return type(self)(*moved, self.bits, self.group_size, self.shape)

    @plain_tensors()
    def gate_beside_up(self, experts: int = 1) -> Self:
        """Undoes `gate_then_up`: rows of gate and of up take turns."""

        def move(rows: torch.Tensor) -> torch.Tensor:
            halves = rows.view(experts, 2, -1, rows.shape[1])
            return halves.transpose(1, 2).reshape(rows.shape)

        moved = move(self.qweight), move(self.scale)
        return type(self)(*moved, self.bits, self.group_size, self.shape)

    @plain_tensors()
    def narrow_each(self, start: int, rows: int, experts: int = 1) -> Self:
        """The rows from `start` on of each expert, one expert after the other."""

        def part(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(experts, -1, tensor.shape[1])[:, start : start + rows].flatten(0, 1)

        shape = (experts * rows, self.shape[1])
        tensors = part(self.qweight), part(self.scale)
        return type(self)(*tensors, self.bits, self.group_size, shape)

    @classmethod
    @plain_tensors()
    def cat(cls, weights: Sequence[Self], experts: int = 1) -> Self:
        """Weights that read the same input, one below the other: along N, of each expert."""
        layouts = {(w.bits, w.group_size, w.shape[1]) for w in weights}
        if len(layouts) != 1:
            raise ValueError(
                f"cat got weights of (bits, group_size, K) {sorted(layouts)}; they must be equal "
                "and at least one: regroup them first"
            )
        if len(weights) == 1:
            return weights[0]
        bits, group_size, k = layouts.pop()
        n = sum(w.shape[0] for w in weights)

        def below(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([t.view(experts, -1, t.shape[1]) for t in tensors], 1).flatten(0, 1)

        # cat promotes: among float16 and float32 scales all become float32, and lose nothing.
        qweight, scale = below([w.qweight for w in weights]), below([w.scale for w in weights])
        return cls(qweight, scale, bits, group_size, (n, k))
