"""How far a quantised matrix is from the original."""

from collections.abc import Sequence

import torch

from fqcompile.quant.chunks import each_chunk, plain_tensors


@plain_tensors()
def relative_error(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    """‖w - ŵ‖ / ‖w‖ (Frobenius) in float64; 0 where w is zero and ŵ equals it."""
    return relative_error_from(each_chunk(lambda rows: squared_norms(w[rows], w_hat[rows]), w))


def squared_norms(w: torch.Tensor, w_hat: torch.Tensor) -> torch.Tensor:
    """(‖w - ŵ‖², ‖w‖²) of a piece, in float64."""
    exact = w.double()
    difference = exact - w_hat.double()
    return torch.stack([torch.linalg.vector_norm(t) for t in (difference, exact)]).square_()


def relative_error_from(pieces: Sequence[torch.Tensor]) -> float:
    """The relative error of the matrix whose pieces have these squared norms."""
    error, total = torch.stack(list(pieces)).sum(0).tolist()
    if error == 0:
        return 0.0
    return float((error / total) ** 0.5) if total else float("inf")
