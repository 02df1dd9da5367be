"""In how many bits weights are, and the matmul that follows as kernels see it."""

from dataclasses import dataclass

import torch

from fqcompile.kernels.spec import GemmSpec
from fqcompile.planner.devices import Device
from fqcompile.planner.sharding import Matrix

PLAIN_BITS = 16
_LEAST_GROUP = 32
_DTYPE = torch.bfloat16  # of activations and scales


@dataclass(frozen=True)
class WeightFormat:
    """Bits and scales: bf16 scales, one for `group` weights along K, or None: for each column.

    Attributes:
        head_bits: of the output head. Embeddings, routers, norms and biases keep 16 bits.
    """

    name: str
    bits: int
    group: int | None
    head_bits: int

    def bits_of(self, matrix: Matrix) -> int:
        """Of that matrix's weights."""
        if matrix.kept:
            return PLAIN_BITS
        return self.head_bits if matrix.is_head else self.bits

    def group_of(self, matrix: Matrix) -> int:
        """The group along K: of 8 bits the column, else halved until it divides K, if it can be."""
        if self.group is None or self.bits_of(matrix) != self.bits:
            return matrix.k
        group = min(self.group, matrix.k)
        while matrix.k % group and group % 2 == 0 and group > _LEAST_GROUP:
            group //= 2
        return group


def formats(group: int | None, head_bits: int) -> dict[str, WeightFormat]:
    """The formats that plans compare; `group` is that of int4."""
    return {
        "bf16": WeightFormat("bf16", PLAIN_BITS, None, PLAIN_BITS),
        "int8": WeightFormat("int8", 8, None, 8),
        "int4": WeightFormat("int4", 4, group, head_bits),
    }


def spec_of(matrix: Matrix, rows: int, form: WeightFormat, device: Device) -> GemmSpec:
    """The matmul with so many rows of x; of experts, routed ones on this GPU."""
    return GemmSpec(
        rows,
        matrix.n,
        matrix.k,
        form.bits_of(matrix),
        form.group_of(matrix),
        _DTYPE,
        _DTYPE,
        "cpu" if device.gpu is None else "cuda",
        gated=matrix.gated,
        gpu=device.gpu,
        experts=matrix.experts,
        routing="grouped" if matrix.experts else None,
    )
