"""GPTQ: codes that make up for each other's errors, from the second moments of the inputs.

For inputs X [rows, K] of a matrix w [N, K], and scales as they are, codes are sought that keep the
outputs: least tr((w - ŵ) A (w - ŵ)ᵀ), where

    H = Xᵀ X / rows        A = (1 - s) H + s diag(H)

Few rows say little about two inputs together, so H is shrunk towards its diagonal by s. With
A = R Rᵀ, R upper triangular, the loss is ‖(w - ŵ) R‖², and of (w - ŵ) R column k depends on the
columns up to k alone. So columns are rounded in their order:

    ŵ_k = nearest level to w_k + Σ_{j<k} (w_j - ŵ_j) R_jk / R_kk

This is GPTQ (arXiv 2210.17323) in the form of LDLQ (arXiv 2307.13304): in exact arithmetic the same
codes, from one factorization and no inverse. Columns are halved again and again, so nearly all work
is in products of large matrices.

Each column is rounded as is best after those before it, not as is best for those behind it: of a
few rows the loss may be more than rounding alone would make it, and these stay as they were.
"""

import math
from dataclasses import replace

import torch

from fqcompile.quant.checks import relative_error_from, squared_norms
from fqcompile.quant.choose import QuantPlan
from fqcompile.quant.rounding import nearest_codes, nearest_levels
from fqcompile.tensor.chunks import each_chunk, plain_tensors
from fqcompile.tensor.codes import pack
from fqcompile.tensor.quantized import QuantizedTensor

# Four matrices of MiniLM, groups of 64, normal levels: the loss on other text beside what rounding
# by weights of errors makes it is .70, .64, .64 and .68 for .1, .3, .5 and .7 from 512 rows, and
# .54, .55, .58 and .64 from 2048.
SHRINKAGE = 0.3
LEAST_ROWS = 512  # fewer may lose more on other text than rounding does
# Rows of w at a time: each step is on one column of them, and their errors are kept.
_ROWS = 4096
_BLOCK = 512  # columns whose losses are found at a time


def refusal(moments: torch.Tensor, rows: int) -> str | None:
    """Why H [K, K] times any number, of so many rows, is not used; None if it is."""
    if rows < LEAST_ROWS:
        return f"it needs {LEAST_ROWS} rows of inputs, and there were {rows}"
    mean = float(moments.diagonal().double().mean())
    if not torch.finfo(torch.float32).tiny <= mean < math.inf:
        return "it needs inputs that are finite and not all zero"
    return None


@plain_tensors()
def factor_of(moments: torch.Tensor) -> torch.Tensor:
    """R [K, K] of H times any number, float32, which is overwritten.

    An input that was always zero tells nothing: its column is rounded, and no other makes up for
    that.
    """
    diagonal = moments.diagonal()
    mean = float(diagonal.double().mean())
    own = (diagonal / mean).clamp_min_(torch.finfo(torch.float32).eps)
    moments.mul_((1 - SHRINKAGE) / mean)
    moments.diagonal().copy_(own)
    # The factor of Cholesky is lower triangular; of columns in the reverse order it is upper.
    lower: torch.Tensor = torch.linalg.cholesky(moments.flip(0, 1))
    return lower.flip(0, 1)


@plain_tensors()
def compensate(w: torch.Tensor, weight: QuantizedTensor, factor: torch.Tensor) -> None:
    """Overwrite the codes of `weight`, made of w [N, K], by codes that make up for their errors.

    `weight` is in the plain layout and keeps its scales; `factor` is R [K, K] of its inputs.
    """
    for start in range(0, len(w), _ROWS):
        rows = slice(start, start + _ROWS)
        own = weight.narrow(start, len(w[rows]))
        columns = _Columns(w[rows], own, factor)
        before = columns.losses_of(own)
        columns.round(0, w.shape[1])
        better = columns.losses < before
        own.qweight[better] = pack(columns.codes()[better], own.format.qtype)


@plain_tensors()
def measured(plan: QuantPlan, w: torch.Tensor, weight: QuantizedTensor) -> QuantPlan:
    """The plan with the errors of `weight`, which has other codes than by rounding w now."""
    stack = w.dim() == 3
    pairs = zip(w, weight.unbind(), strict=True) if stack else [(w, weight)]
    norms = [_squared_norms(*pair) for pair in pairs]
    errors = tuple(map(relative_error_from, norms)) if stack else ()
    whole = relative_error_from(torch.cat(norms))
    return replace(plan, relative_error=whole, expert_errors=errors)


def _squared_norms(w: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    def norms(rows: slice) -> torch.Tensor:
        part = weight.narrow(rows.start, rows.stop - rows.start)
        return squared_norms(w[rows], part.dequantize(torch.float32))

    return torch.cat(each_chunk(norms, w))


class _Columns:
    """Columns of some rows of w, which are rounded one after the other; each lies as a row here.

    Attributes:
        values: w_k, and of columns that are rounded the levels.
        errors: Σ_{j<k} (w_j - ŵ_j) R_jk so far, and of columns that are rounded w_k - ŵ_k.
        losses: those of the columns that are rounded, for each row of w.
    """

    def __init__(self, w: torch.Tensor, weight: QuantizedTensor, factor: torch.Tensor) -> None:
        self.values = w.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        self.errors = torch.zeros_like(self.values)
        self.losses = torch.zeros_like(self.values[0])
        self._scale = weight.scale.T.float().contiguous()
        self._qtype, self._group_size = weight.format.qtype, weight.group_size
        self._factor, self._steps = factor, factor.diagonal().tolist()

    def losses_of(self, weight: QuantizedTensor) -> torch.Tensor:
        """The losses that these codes have, where no column is rounded yet."""
        errors = self.values - weight.dequantize(torch.float32).T
        losses = torch.zeros_like(self.losses)
        for stop in range(_BLOCK, len(errors) + _BLOCK, _BLOCK):
            columns = slice(stop - _BLOCK, stop)
            losses += (self._factor[:stop, columns].T @ errors[:stop]).square_().sum(0)
        return losses

    def round(self, start: int, stop: int) -> None:
        """Round these columns; the errors of those before them are in their sums."""
        if stop - start == 1:
            self._round_one(start)
            return
        middle = (start + stop) // 2
        self.round(start, middle)
        ahead = self._factor[start:middle, middle:stop]
        self.errors[middle:stop].addmm_(ahead.T, self.errors[start:middle])
        self.round(middle, stop)

    def _round_one(self, k: int) -> None:
        w, error, scale = self.values[k], self.errors[k], self._scale[k // self._group_size]
        wanted = torch.add(w, error, alpha=1 / self._steps[k])
        level = nearest_levels(wanted / scale, self._qtype)
        torch.addcmul(w, level, scale, value=-1, out=error)
        missed = wanted.addcmul_(level, scale, value=-1)
        self.losses.addcmul_(missed, missed, value=self._steps[k] ** 2)
        w.copy_(level)

    def codes(self) -> torch.Tensor:
        """int8 [N, K], when all columns are rounded."""
        codes = nearest_codes(self.values, self._qtype)
        return torch.empty(codes.T.shape, dtype=torch.int8, device=codes.device).copy_(codes.T)
