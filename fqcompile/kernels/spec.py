"""GemmSpec: everything that decides which kernel may run a quantised matmul, and nothing else.

y[M, N] = act(x[M, K] @ ŵ[N, K]ᵀ + bias[N]) + residual[M, N]
gated: ŵ has 2N rows, gate over up:  y = act(x @ gateᵀ + b_gate) * (x @ upᵀ + b_up) + residual
experts: ŵ[E, N, K], and each row of x has its expert:  y[m] = act(x[m] @ ŵ[e(m)]ᵀ + bias[e(m)])
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fqcompile.kernels.gpu import Gpu


@dataclass(frozen=True)
class GemmSpec:
    """One quantised matmul as kernels see it; the key of selection and tuning.

    Attributes:
        m: rows of x in the call that the graph was captured with.
        n: columns of the output (half the weight's rows when `gated`).
        k: the reduced dimension.
        dtype: of x and of the output.
        needs_backward: the weight must be dequantisable again, since x may require grad or since
            the packed copy is its only one.
        m_range: least and largest number of rows (None: no bound) where the graph leaves it open.
        gpu: the GPU that it will run on; None elsewhere.
        experts: matrices in the stack; 0 for a plain linear, which has one and no routing.
        routing: how the rows of x are told their experts, see `kernels.routing`; m counts the
            routed rows, so tokens times experts per token.
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
    m_range: tuple[int, int | None] | None = None
    gpu: Gpu | None = None
    experts: int = 0
    routing: Literal["grouped", "gathered"] | None = None

    @property
    def weight_rows(self) -> int:
        """Rows of the packed weight, of one expert where there are several."""
        return 2 * self.n if self.gated else self.n
