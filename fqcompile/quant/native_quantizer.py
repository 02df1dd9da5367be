"""Scales, errors and codes by the C++ of native/quantize.cpp: bit for bit what `scale_search` and
`affine` make with PyTorch's operations, ten times as fast."""

from collections.abc import Iterator, Sequence
from struct import Struct

import torch
from torch import Tensor
from torch.nn.functional import pad

from fqcompile.locks import in_forked_child
from fqcompile.native import library as native
from fqcompile.native.interface import DTYPES, LEVELS_AT
from fqcompile.quant.scale_search import REFITS, error_table, group_weights
from fqcompile.tensor.chunks import row_chunks
from fqcompile.tensor.format import QType, num_groups

# Weights that one call takes, in units of a piece of `row_chunks`: a rest of a second, so that a
# signal is answered soon, and a small copy where rows are not contiguous.
_CALL = 64.0
# The structs that the two C++ functions read; all fields have eight bytes.
_MATRIX, _SEARCH, _ENCODE = Struct("=7q"), Struct("=12q"), Struct("=6q")


def takes(w: Tensor) -> bool:
    """Whether the C++ reads w [N, K]; builds it if need be."""
    return w.device.type == "cpu" and w.dtype in DTYPES and native.refusal() is None


def search_scales(w: Tensor, qtype: QType, group_size: int, h: Tensor | None) -> Tensor:
    """Scales [N, G] of least squared error, unrounded; 1 where a group is zero.

    h [G, g] are weights of squared errors as `group_weights` makes them, or None for 1.
    """
    shape = w.shape[0], num_groups(w.shape[1], group_size)
    scales = w.new_empty(shape, dtype=torch.float32)  # whatever the defaults are
    for rows, piece in _pieces(w):
        _search(piece, "mse", qtype, group_size, h, scales=scales[rows])
    return scales


def row_errors(
    w: Tensor, method: str, qtype: QType, candidates: Sequence[int], h: Tensor | None
) -> Tensor:
    """sum h w^2 of each row of w [N, K], then the sum of h (w - ŵ)^2 for each candidate's groups.

    float64 [1 + candidates, N]; h [K] are weights of squares, or None for 1.
    """
    sums = w.new_empty(1 + len(candidates), w.shape[0], dtype=torch.float64)
    exact = None if h is None else pad(h.double(), (0, 8 + (1 << w.shape[1].bit_length())))
    weights = [(None, None) if h is None else group_weights(h, size) for size in candidates]
    for rows, piece in _pieces(w):
        totals: Tensor | None = sums[0, rows]
        for size, (own, factors), errors in zip(candidates, weights, sums[1:], strict=True):
            _search(
                piece, method, qtype, size, own,
                factors=factors, exact=exact, errors=errors[rows], totals=totals,
            )  # fmt: skip
            totals = None
    return sums


def encode(w: Tensor, scale: Tensor, qtype: QType, group_size: int, qweight: Tensor) -> Tensor:
    """Writes the packed codes of w [N, K] to qweight; `squared_norms` of its rows [N, 2]."""
    norms = w.new_empty(w.shape[0], 2, dtype=torch.float64)
    library = native.native_library()
    for rows, piece in _pieces(w):
        own, codes = scale[rows], qweight[rows]
        assert own.is_contiguous() and codes.is_contiguous(), "C++ reads rows one after the other"
        fields = _ENCODE.pack(
            own.data_ptr(), DTYPES[own.dtype], codes.data_ptr(), codes.shape[1],
            norms[rows].data_ptr(), in_forked_child(),
        )  # fmt: skip
        library.encode(_matrix(piece, qtype, group_size) + fields)
    return norms


def _pieces(w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for rows in row_chunks(w, _CALL):
        yield rows, w[rows].contiguous()


def _matrix(w: Tensor, qtype: QType, group_size: int) -> bytes:
    levels = LEVELS_AT[qtype.levels]
    return _MATRIX.pack(w.data_ptr(), DTYPES[w.dtype], *w.shape, group_size, qtype.bits, levels)


def _search(
    w: Tensor,
    method: str,
    qtype: QType,
    group_size: int,
    h: Tensor | None,
    scales: Tensor | None = None,
    factors: Tensor | None = None,
    exact: Tensor | None = None,
    errors: Tensor | None = None,
    totals: Tensor | None = None,
) -> None:
    """One call. Results are written to `scales` [N, G], `errors` [N], `totals` [N], if given."""
    steps, table = error_table(method, qtype, w.device)
    tensors = h, factors, exact, scales, errors, totals
    own = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    fields = _SEARCH.pack(
        *own, table.data_ptr(), steps.data_ptr(), len(table) - 2, len(steps),
        0 if scales is None else REFITS, in_forked_child(),
    )  # fmt: skip
    native.native_library().search(_matrix(w, qtype, group_size) + fields)
