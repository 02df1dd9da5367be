"""The nearest level of a weight that is divided by its scale, and its code.

Uniform levels are met by rounding half to even. Between other levels, the midpoints are multiples
of 1/32, so a table of cells of that width tells the code exactly:

    cell = floor(32 v)        code = qmin + the number of midpoints <= v

so of two levels equally near the upper one is taken. Both ways are monotone.
"""

from functools import lru_cache

import torch

from fqcompile.tensor.chunks import plain_tensors
from fqcompile.tensor.format import QType

_CELLS = 512  # 32 for each unit from -8 to 8: levels are at most 127/16
_PER_UNIT = 32


def nearest_codes(v: torch.Tensor, qtype: QType) -> torch.Tensor:
    """Codes of v, as int8 or whole numbers of v's type; v is overwritten."""
    if qtype.sixteenths is None:
        return v.round_().clamp_(qtype.qmin, qtype.qmax)
    return _look_up(v, _tables(qtype, v.device)[0])


def nearest_levels(v: torch.Tensor, qtype: QType) -> torch.Tensor:
    """The levels of those codes, as float32 or of v's type; v is overwritten."""
    if qtype.sixteenths is None:
        return v.round_().clamp_(qtype.qmin, qtype.qmax)
    return _look_up(v, _tables(qtype, v.device)[1])


def _look_up(v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    half = _CELLS // 2
    cells = v.mul_(_PER_UNIT).floor_().clamp_(-half, half - 1).int().add_(half)
    # NaN is any integer: of a weight that is written to meanwhile, all that counts is to stay here.
    return table.index_select(0, cells.bitwise_and_(_CELLS - 1).flatten()).view(v.shape)


@lru_cache(maxsize=8)
@plain_tensors()
def _tables(qtype: QType, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and level of each cell."""
    assert qtype.sixteenths is not None
    sixteenths = torch.tensor(qtype.sixteenths, device="cpu")
    # In 32nds, as the cells are: (a + b) / 2 / 16.
    midpoints = sixteenths[1:] + sixteenths[:-1]
    cells = torch.arange(-_CELLS // 2, _CELLS // 2, device="cpu")
    index = torch.bucketize(cells, midpoints, right=True)
    codes = (index + qtype.qmin).to(torch.int8)
    return codes.to(device), (sixteenths[index].float() / 16).to(device)
