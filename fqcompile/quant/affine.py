"""Quantization along K to the nearest level:

    q = nearest(w / scale)        w ≈ level[q] * scale

One signed scale per group; `scale` is rounded to the type it is stored in before q is computed, so
|w - level[q] * scale| <= |scale| * gap / 2 wherever nothing is clipped, where gap is the distance
of the levels on both sides of w / scale: 1 if levels are uniform. A group of zeros has scale 1,
codes 0.
"""

from collections.abc import Callable

import torch

from fqcompile.quant import native_quantizer
from fqcompile.quant.checks import squared_norms
from fqcompile.quant.rounding import nearest_codes
from fqcompile.quant.scale_search import (
    counted_groups,
    group_weights,
    search_scale,
    search_share,
    signed_extremes,
)
from fqcompile.tensor.chunks import each_chunk, group_parts, plain_tensors
from fqcompile.tensor.codes import dequantize_rows, pack
from fqcompile.tensor.format import UNIFORM, QType


def _absmax_scale(
    groups: torch.Tensor, extremes: torch.Tensor, qtype: QType, h: torch.Tensor | None
) -> torch.Tensor:
    """The extreme gets the uppermost level, and clips nothing: the lowest is farther from zero."""
    # The step's sign makes no difference to uniform levels: a positive one, as others have it.
    signed = extremes.abs() if qtype.levels == UNIFORM else extremes
    return signed / qtype.values[-1]


Method = Callable[[torch.Tensor, torch.Tensor, QType, torch.Tensor | None], torch.Tensor]
SCALE_METHODS: dict[str, Method] = {
    "mse": search_scale,
    "absmax": _absmax_scale,
}


@plain_tensors()
def choose_scale(
    w: torch.Tensor,
    qtype: QType,
    group_size: int,
    method: str,
    scale_dtype: torch.dtype,
    h: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales [N, G] of w [N, K] in `scale_dtype`, or in float32 if that cannot hold them all.

    `h` [K], float32: weights of squared errors, where the method minimizes their sum.
    """
    # No product of a level and a scale may leave the range of the weight's own type; no level is
    # beyond qmin, and a division by that power of two is exact.
    largest = min(torch.finfo(w.dtype).max, torch.finfo(torch.float32).max) / -qtype.qmin
    group_size = min(group_size, w.shape[1])
    weights = None if h is None else group_weights(h, group_size)[0]
    if method == "mse" and native_quantizer.takes(w):
        scale = native_quantizer.search_scales(w, qtype, group_size, weights)
    else:
        scale = _search_scales(w, qtype, group_size, method, weights)
    scale.clamp_(-largest, largest)
    # The smallest normal number: a denormal scale would lose the bound on the error.
    tiny = torch.finfo(torch.float32).tiny
    scale.masked_fill_(scale.abs() < tiny, tiny)
    return _stored(scale, scale_dtype, largest, qtype)


def _search_scales(
    w: torch.Tensor, qtype: QType, group_size: int, method: str, h: torch.Tensor | None
) -> torch.Tensor:
    """Scales [N, G], unrounded; 1 where a group is zero. What `native_quantizer` does as well."""

    def search(rows: slice) -> torch.Tensor:
        groups = counted_groups(w[rows], group_size, h)
        extremes = signed_extremes(groups)
        return SCALE_METHODS[method](groups, extremes, qtype, h).masked_fill_(extremes == 0, 1)

    return torch.cat(each_chunk(search, w, search_share(group_size)))


def _stored(scale: torch.Tensor, dtype: torch.dtype, largest: float, qtype: QType) -> torch.Tensor:
    """Scales rounded to `dtype`, or as they are if one of them is not a normal number there."""
    rounded = scale.to(dtype)
    magnitude = rounded.float().abs()
    largest = min(largest, torch.finfo(dtype).max / -qtype.qmin)
    normal = (magnitude >= torch.finfo(dtype).tiny) & (magnitude <= largest)
    return rounded if bool(normal.all()) else scale


@plain_tensors()
def quantize_affine(
    w: torch.Tensor, scale: torch.Tensor, qtype: QType, group_size: int
) -> torch.Tensor:
    """Codes of w [N, K] as int8 [N, K]."""
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)

    def fill(rows: slice) -> None:
        values = w[rows].to(torch.float32, copy=True)
        for part, s in group_parts(values, scale[rows].float(), group_size):
            part.div_(s)
        codes[rows] = nearest_codes(values, qtype)

    each_chunk(fill, w)
    return codes


@plain_tensors()
def encode(
    w: torch.Tensor, scale: torch.Tensor, qtype: QType, group_size: int, qweight: torch.Tensor
) -> torch.Tensor:
    """Writes the packed codes of w [N, K] to qweight; `squared_norms` of its rows [N, 2]."""
    group_size = min(group_size, w.shape[1])
    if native_quantizer.takes(w):
        return native_quantizer.encode(w, scale, qtype, group_size, qweight)

    def encode_rows(rows: slice) -> torch.Tensor:
        qweight[rows] = pack(quantize_affine(w[rows], scale[rows], qtype, group_size), qtype)
        form = (qtype, group_size, w.shape[1], torch.float32)
        return squared_norms(w[rows], dequantize_rows(qweight[rows], scale[rows], *form))

    return torch.cat(each_chunk(encode_rows, w))
