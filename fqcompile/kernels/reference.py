"""The oracle: dequantise, multiply in fp32, epilogue in fp32, round once. Any device."""

import torch

from fqcompile.kernels.epilogue import apply_epilogue


def linear_reference(
    x: torch.Tensor,
    w_hat: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> torch.Tensor:
    """`act(x @ ŵᵀ + bias) + residual` in fp32, rounded to x's dtype at the end.

    Shapes: x [..., K], w_hat [N, K] (2N rows when `gated`), bias [rows], residual [..., N].
    """
    z = torch.matmul(x.float(), w_hat.float().t())
    return apply_epilogue(z, bias, residual, activation, gated).to(x.dtype)
