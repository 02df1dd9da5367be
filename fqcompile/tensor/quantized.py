"""QuantizedTensor: a weight as codes and scales, and its operations that need no kernel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fqcompile.tensor.chunks import plain_tensors
from fqcompile.tensor.codes import dequantize_rows
from fqcompile.tensor.format import PLAIN, Format, num_groups


# Not frozen: operators make one in every call, and that would take them four times as long.
@dataclass(slots=True, eq=False)
class QuantizedTensor:
    """Codes and scales, w ≈ level[q] * scale, and how to read them; compared by identity.

    In the plain layout `qweight` is [N, bytes of a row] and `scale` [N, G]; those of a stack of
    experts have one more dimension in front, in every layout. What follows `dequantize` needs the
    plain layout; where there are experts it is done to each of them.
    """

    qweight: Tensor
    scale: Tensor
    format: Format

    @classmethod
    def of_rows(cls, qweight: Tensor, scale: Tensor, format: Format) -> Self:
        """From the rows of all experts one below the other, as files hold them; views."""
        if not format.experts:
            return cls(qweight, scale, format)
        size = (format.experts, format.rows)
        return cls(qweight.unflatten(0, size), scale.unflatten(0, size), format)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Codes and scales, as operators take them."""
        return self.qweight, self.scale

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def group_size(self) -> int:
        return self.format.group_size

    @property
    def rows(self) -> int:
        return self.format.rows

    @property
    def k(self) -> int:
        return self.format.k

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrices, (N, K) or (E, N, K)."""
        return self.format.matrices

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, with what fills up the layout."""
        return self.qweight.nbytes + self.scale.nbytes

    def changed(self, **changes: Any) -> Self:
        """The same codes and scales under a format with other values, such as `transposed`."""
        return type(self)(self.qweight, self.scale, replace(self.format, **changes))

    def to(self, device: torch.device | str) -> Self:
        """On another device."""
        return type(self)(self.qweight.to(device), self.scale.to(device), self.format)

    def clone(self) -> Self:
        """In memory of its own."""
        return type(self)(self.qweight.clone(), self.scale.clone(), self.format)

    def expert(self, index: int) -> Self:
        """One matrix of a stack; a view."""
        return type(self)(self.qweight[index], self.scale[index], self.format.one)

    def unbind(self) -> list[Self]:
        """All matrices of a stack; views."""
        return [self.expert(index) for index in range(self.format.experts)]

    def some_experts(self, start: int, count: int) -> Self:
        """`count` experts from `start` on, as a stack; views."""
        some = slice(start, start + count)
        form = replace(self.format, experts=count)
        return type(self)(self.qweight[some], self.scale[some], form)

    @classmethod
    @plain_tensors()
    def stack(cls, weights: Sequence[Self]) -> Self:
        """Matrices of one format as a stack of experts."""
        form = replace(weights[0].format, experts=len(weights))
        qweight = torch.stack([weight.qweight for weight in weights])
        return cls(qweight, torch.stack([weight.scale for weight in weights]), form)

    @plain_tensors()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """ŵ [N, K] or [E, N, K] in `dtype`."""
        f, (codes, scale) = self.format, self.as_rows()
        return dequantize_rows(codes, scale, f.qtype, f.group_size, f.k, dtype).view(f.matrices)

    def as_rows(self) -> tuple[Tensor, Tensor]:
        """Codes and scales as `of_rows` takes them: all experts' rows one below the other."""
        if not self.format.experts:
            return self.tensors
        return self.qweight.flatten(0, 1), self.scale.flatten(0, 1)

    @plain_tensors()
    def regroup(self, group_size: int) -> Self:
        """The same values under a finer group size: scales are repeated, codes are shared."""
        k, own = self.k, self.group_size
        if group_size == own:
            return self
        one_group = own >= k
        if group_size < 1 or (own % group_size and not one_group):
            raise ValueError(
                f"group_size {group_size} does not divide the group size {own} of a weight of "
                f"K = {k}; regroup to a divisor of {own}"
            )
        groups = num_groups(k, group_size)
        repeats = groups if one_group else own // group_size
        # The repeats of a short last group reach beyond K.
        scale = self.scale.repeat_interleave(repeats, -1)[..., :groups].contiguous()
        return self._of(self.qweight, scale, group_size=min(group_size, k))

    @plain_tensors()
    def coarsen(self, group_size: int) -> Self:
        """What `regroup` came from: of the repeated scales every group keeps its first."""
        whole = group_size >= self.k
        step = self.scale.shape[-1] if whole else group_size // self.group_size
        return self._of(self.qweight, self.scale[..., ::step].contiguous(), group_size=group_size)

    def narrow(self, start: int, rows: int) -> Self:
        """The rows from `start` on; views."""
        return self._moved(lambda tensor: tensor.narrow(-2, start, rows), rows=rows)

    @plain_tensors()
    def gate_then_up(self) -> Self:
        """The rows 0, 2, 4, ... before the rows 1, 3, 5, ..."""
        return self._moved(lambda t: t.unflatten(-2, (-1, 2)).transpose(-3, -2).reshape(t.shape))

    @plain_tensors()
    def gate_beside_up(self) -> Self:
        """Undoes `gate_then_up`: rows of gate and of up take turns."""
        return self._moved(lambda t: t.unflatten(-2, (2, -1)).transpose(-3, -2).reshape(t.shape))

    @classmethod
    @plain_tensors()
    def cat(cls, weights: Sequence[Self], dim: int = -2) -> Self:
        """Weights that read the same input, one below the other; with `dim` 0, stacks as one."""
        layouts = {(w.bits, w.format.levels, w.group_size, w.k) for w in weights}
        if len(layouts) != 1:
            raise ValueError(
                f"cat got weights of (bits, levels, group_size, K) {sorted(layouts)}; they must be "
                "equal and at least one: regroup them first"
            )
        if len(weights) == 1:
            return weights[0]
        # cat promotes: among float16 and float32 scales all become float32, and lose nothing.
        tensors = [
            torch.cat(parts, dim) for parts in zip(*(w.tensors for w in weights), strict=True)
        ]
        size = "rows" if dim == -2 else "experts"
        total = sum(getattr(w.format, size) for w in weights)
        return cls(tensors[0], tensors[1], replace(weights[0].format, **{size: total}))

    def _of(self, qweight: Tensor, scale: Tensor, **changes: Any) -> Self:
        assert self.format.layout == PLAIN, f"rows of layout {self.format.layout} are elsewhere"
        return type(self)(qweight, scale, replace(self.format, **changes))

    def _moved(self, move: Callable[[Tensor], Tensor], **changes: Any) -> Self:
        return self._of(move(self.qweight), move(self.scale), **changes)
