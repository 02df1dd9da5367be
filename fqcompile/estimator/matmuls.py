"""In how many bits weights are, the matmul that follows as kernels see it, and its seconds."""

from dataclasses import dataclass
from functools import cache

import torch

from fqcompile.estimator.devices import Device
from fqcompile.estimator.sharding import Matrix
from fqcompile.kernels.epilogue import HAS_TRITON
from fqcompile.kernels.roofline import M, dense, ideal
from fqcompile.kernels.spec import DENSE, GemmSpec

if HAS_TRITON:
    from fqcompile.kernels.triton.configs import candidates
    from fqcompile.kernels.triton.cost import cost

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


@cache
def matmul_seconds(spec: GemmSpec, device: Device, hit: float | None = None) -> float:
    """Of spec.m rows; `hit`: how many experts they read.

    A quantised weight on a GPU takes what the cost model says of the configuration that it ranks
    first, which is what `select` chooses. Weights of 16 bits, a CPU, and a machine without Triton:
    the roofline, and a launch.
    """
    if spec.gpu is None or spec.bits == PLAIN_BITS or not HAS_TRITON:
        return float(ideal(spec, device, hit).subs(M, spec.m)) + device.launch_seconds
    config = candidates(spec, spec.m, "fast")[0]
    if config is DENSE:
        return float(dense(spec, spec.gpu).subs(M, spec.m))
    return cost(spec, config, spec.gpu, spec.m, hit).seconds
