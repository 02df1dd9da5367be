"""Check that a weight can be quantized, with the reason if not; and measure the error."""

from collections.abc import Sequence

import torch

from fqcompile.errors import UnquantizableWeight
from fqcompile.tensor.chunks import each_chunk, halving_sum, plain_tensors, row_chunks

FLOAT_DTYPES = torch.float32, torch.float16, torch.bfloat16, torch.float64
WEIGHT_DTYPES = FLOAT_DTYPES[:3]  # what models are quantized in
# A model that accelerate offloads has all its weights there between calls.
NO_VALUES = (
    "on the meta device and holds no values: load it first; or, if accelerate offloads the model, "
    "call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
)
OTHER_DTYPE = "dtype {} is not supported; use fp32, fp16 or bf16"


@plain_tensors()
def check_quantizable(w: torch.Tensor) -> None:
    """Raise UnquantizableWeight unless w is a dense, finite matrix of floating point numbers."""
    _check_kind(w)
    _check_finite(w)


def _check_kind(w: torch.Tensor) -> None:
    if w.layout != torch.strided or w.is_nested:
        layout = "nested" if w.is_nested else w.layout
        raise UnquantizableWeight(f"layout is {layout}; only dense weights can be quantized")
    if w.is_quantized or w.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise UnquantizableWeight(f"dtype is {w.dtype}; only {allowed} can be quantized")
    if w.device.type == "meta":
        raise UnquantizableWeight(f"weight is {NO_VALUES}")
    if w.dim() != 2:
        raise UnquantizableWeight(f"shape is {tuple(w.shape)}; only matrices (N, K)")
    if w.numel() == 0:
        raise UnquantizableWeight(f"shape is {tuple(w.shape)}: there is nothing to quantize")


def _check_finite(w: torch.Tensor) -> None:
    def bounds(rows: slice) -> torch.Tensor:
        # Minimum and maximum hand NaN on; two reads are cheaper than a mask.
        return torch.stack([w[rows].amin(), w[rows].amax()])

    extremes = torch.stack(each_chunk(bounds, w))
    if not bool(extremes.float().isfinite().all()):
        _raise_not_finite(w)
    largest = float(extremes.abs().max())
    if 0 < largest < torch.finfo(torch.float32).smallest_normal and w.dtype == torch.float64:
        raise UnquantizableWeight(
            f"the largest magnitude is {largest:.3g}, which float32 cannot hold: scale the weight"
        )


def _raise_not_finite(w: torch.Tensor) -> None:
    count, first = 0, ""
    for rows in row_chunks(w):
        bad = (~w[rows].float().isfinite()).nonzero()
        if len(bad) and not count:
            row, column = bad[0].tolist()
            first = f"{w[row + rows.start, column].item()} at {(row + rows.start, column)}"
        count += len(bad)
    kind = "beyond the range of float32" if bool(w.isfinite().all()) else "NaN or infinite"
    raise UnquantizableWeight(f"{count} of {w.numel()} values are {kind}; the first is {first}")


def error_weights_of(w: torch.Tensor, h: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """The weights of squared errors, [K] or None, of each matrix of w [N, K] or [E, N, K].

    Zeros throughout are None: they say nothing. The largest is made 1 to 2 by a power of two.

    Raises:
        ValueError: `h` is not float32 [K] or [E, K], or is negative, infinite or NaN somewhere.
    """
    experts = w.shape[0] if w.dim() == 3 else 1
    if h is None:
        return [None] * experts
    shape = (*w.shape[:-2], w.shape[-1])
    if h.dtype != torch.float32 or h.shape != shape:
        raise ValueError(
            f"h is {h.dtype} {tuple(h.shape)}; the weights of the squared errors of a weight of "
            f"shape {tuple(w.shape)} must be torch.float32 {shape}"
        )
    if not bool((h.isfinite() & (h >= 0)).all()):
        raise ValueError(
            "h is negative, infinite or NaN somewhere; the weights of squared errors must be "
            "finite and not negative: pass None to weigh all errors alike"
        )
    return [_normalized(one.to(w.device)) for one in h.view(experts, -1)]


def _normalized(h: torch.Tensor) -> torch.Tensor | None:
    largest = h.max()
    if not bool(largest > 0):
        return None
    return (h.double() * 2.0 ** (1 - torch.frexp(largest).exponent.item())).float()


@plain_tensors()
def relative_error(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    """‖w - ŵ‖ / ‖w‖ (Frobenius) in float64; 0 if both w and ŵ are zero."""
    return relative_error_from(
        torch.cat(each_chunk(lambda rows: squared_norms(w[rows], w_hat[rows]), w))
    )


def squared_norms(w: torch.Tensor, w_hat: torch.Tensor) -> torch.Tensor:
    """(‖w - ŵ‖², ‖w‖²) of each row, in float64 [N, 2]."""
    exact = w.double()
    difference = exact - w_hat.double()
    return torch.stack([halving_sum(t.square()) for t in (difference, exact)], -1)


def relative_error_from(norms: torch.Tensor) -> float:
    """The relative error of the matrix whose rows have these squared norms [N, 2]."""
    error, total = halving_sum(norms, 0).tolist()
    if error == 0:
        return 0.0
    return float((error / total) ** 0.5) if total else float("inf")
