"""GemmSpec: everything that decides which kernel may run a quantised matmul, and nothing else.

y[M, N] = act(x[M, K] @ ŵ[N, K]ᵀ + bias[N]) + residual[M, N]
gated: ŵ has 2N rows, gate over up:  y = act(x @ gateᵀ + b_gate) * (x @ upᵀ + b_up) + residual
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmSpec:
    """One quantised matmul as kernels see it; the key of selection and tuning.

    Attributes:
        m: rows of x in the call that the graph was captured with.
        dynamic_m: whether the graph leaves the number of rows open.
        n: columns of the output (half the weight's rows when `gated`).
        k: the reduced dimension.
        dtype: of x and of the output.
        needs_backward: x may require grad, so the weight must be dequantisable again.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device_type: str
    activation: str = "none"
    gated: bool = False
    has_bias: bool = False
    has_residual: bool = False
    needs_backward: bool = False
    dynamic_m: bool = False

    @property
    def weight_rows(self) -> int:
        """Rows of the packed weight."""
        return 2 * self.n if self.gated else self.n
