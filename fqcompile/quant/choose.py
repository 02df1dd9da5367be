"""Choose how to quantize a matrix or a stack of experts, and quantize it.

A group size is chosen for each expert [N, K] of a stack [E, N, K] as for a matrix; the stack gets
the finest, because one kernel runs all experts and outliers of one expert must not lose accuracy.

`h` are the weights of squared errors, float32 [K], or [E, K] for a stack, or None for 1: scales and
group sizes minimize sum h (w - ŵ)^2. Codes are the same for h times a power of two, and for other
multiples up to the rounding of h. The relative errors in plans are not weighted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.quant.affine import choose_scale, encode
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.checks import (
    check_quantizable,
    error_weights_of,
    relative_error_from,
)
from fqcompile.quant.granularity import RULES, group_size_candidates
from fqcompile.tensor.chunks import plain_tensors
from fqcompile.tensor.format import INT8, QTYPES, UNIFORM, Format, QType, packed_columns, qtype_for
from fqcompile.tensor.quantized import QuantizedTensor

T = TypeVar("T")


@dataclass(frozen=True)
class QuantPlan:
    """How a weight is quantized, and the resulting relative error of the whole weight.

    `expert_errors` are the errors of the experts of a stack, in order; empty for a matrix.
    `calibration` is what its errors were weighed with; None where nobody asked for it.
    """

    bits: int
    group_size: int
    scale_method: str
    scale_dtype: torch.dtype
    relative_error: float
    expert_errors: tuple[float, ...] = ()
    levels: str = UNIFORM
    calibration: Calibration | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, form: Format, scale_dtype: torch.dtype) -> Self:
        """The plan of a weight in this format, whose error is not known any more."""
        known = (form.bits, form.group_size, form.scale_method, scale_dtype)
        return cls(*known, math.nan, levels=form.levels)

    @property
    def choice(self) -> tuple[int, int, str, str, torch.dtype]:
        """What codes and scales of given values depend on."""
        return self.bits, self.group_size, self.levels, self.scale_method, self.scale_dtype

    def form(self, rows: int, k: int, experts: int = 0) -> Format:
        """The format of a weight of this size, in the plain layout."""
        return Format(
            self.bits,
            self.group_size,
            rows,
            k,
            experts,
            scale_method=self.scale_method,
            levels=self.levels,
        )

    @property
    def asked(self) -> str | None:
        """The calibration that was asked for, which codes and scales depend on too."""
        return None if self.calibration is None else self.calibration.asked

    @property
    def worst_error(self) -> float:
        """Error of the matrix, or of the worst expert: the value that `error_budget` bounds."""
        return max(self.expert_errors, default=self.relative_error)


@plain_tensors()
def choose_and_quantize(
    w: torch.Tensor,
    options: SiteOptions,
    scale_dtype: torch.dtype,
    h: torch.Tensor | None = None,
) -> tuple[QuantPlan, QuantizedTensor]:
    """Choose bits, group size and scale dtype of w [N, K] or [E, N, K] and quantize; deterministic.

    Raises:
        UnquantizableWeight: its message is the reason in the report.
        ValueError: `h` has another shape or dtype, or is negative, infinite or NaN somewhere.
    """
    matrices = _checked_matrices(w)
    own = error_weights_of(w, h)
    group_size = min(
        _first_group_size(matrix, options, scale_dtype, weights)
        for matrix, weights in _distinct(list(zip(matrices, own, strict=True)), options)
    )
    budget = math.inf if options.error_budget is None else options.error_budget
    plans = []
    for bits, size in _attempts(options, group_size, w.shape[-1]):
        qtype = qtype_for(bits, options.levels)
        plan, weight = _deliver(w, qtype, size, options.scale_method, scale_dtype, own)
        if plan.worst_error <= budget:
            return plan, weight
        plans.append(plan)
    best = min(plans, key=lambda plan: plan.worst_error)
    where = f"expert {best.expert_errors.index(best.worst_error)}: " if best.expert_errors else ""
    raise UnquantizableWeight(
        f"{where}error_budget {budget:g} cannot be met: the best relative error is "
        f"{best.worst_error:.3g}, at {best.bits} bits and group size {best.group_size}; "
        "raise error_budget or lower min_group_size"
    )


def _checked_matrices(w: torch.Tensor) -> Sequence[torch.Tensor]:
    """The matrix, or the experts of the stack, checked; an error names the expert."""
    if w.dim() != 3 or not len(w):
        check_quantizable(w)
        return [w]
    for expert, matrix in enumerate(w):
        try:
            check_quantizable(matrix)
        except UnquantizableWeight as error:
            raise UnquantizableWeight(f"expert {expert}: {error}") from error
    return w.unbind()


def _distinct(matrices: Sequence[T], options: SiteOptions) -> Sequence[T]:
    """The matrices to choose group sizes for: all of them, if the rule depends on their values."""
    return matrices if options.granularity in RULES else matrices[:1]


def scale_dtype_beside(activation: torch.dtype) -> torch.dtype:
    """The dtype of scales: the activation's own 16-bit dtype; fp16 for fp32 activations.

    Codes are computed for the rounded scale, so 16 bits cost no accuracy and allow finer groups:
    MiniLM, int4 adaptive, mean error .112 at 4.12 bits per weight with fp32 scales, .100 at 4.19
    with fp16. Scales out of fp16's normal range are stored in fp32.
    """
    return torch.float16 if activation == torch.float32 else activation


def choose_plan(
    w: torch.Tensor,
    options: SiteOptions,
    scale_dtype: torch.dtype,
    h: torch.Tensor | None = None,
) -> QuantPlan:
    """Only the plan of `choose_and_quantize`."""
    return choose_and_quantize(w, options, scale_dtype, h)[0]


@plain_tensors()
def quantize_weight(
    w: torch.Tensor, plan: QuantPlan, h: torch.Tensor | None = None
) -> QuantizedTensor:
    """w [N, K] or [E, N, K] quantized as planned, in fresh ordinary tensors on the device of w.

    Without `h`, errors are weighed as the plan's calibration says. Raises as `choose_and_quantize`.
    """
    _checked_matrices(w)
    if h is None and plan.calibration is not None:
        h = plan.calibration.h
    own = error_weights_of(w, h)
    qtype = QTYPES[plan.bits, plan.levels]
    return _deliver(w, qtype, plan.group_size, plan.scale_method, plan.scale_dtype, own)[1]


def _first_group_size(
    w: torch.Tensor, options: SiteOptions, scale_dtype: torch.dtype, h: torch.Tensor | None
) -> int:
    k, granularity = w.shape[1], options.granularity
    if granularity == "column":
        return k
    if isinstance(granularity, int):
        if granularity > k:
            raise UnquantizableWeight(
                f"granularity {granularity} is larger than K = {k}; "
                f'use a group size of at most {k}, or "column" for one scale per column'
            )
        return granularity
    candidates = group_size_candidates(k, options.min_group_size)
    if len(candidates) == 1:
        return k
    return RULES[granularity](w, candidates, options, torch.finfo(scale_dtype).bits, h)


def _attempts(options: SiteOptions, group_size: int, k: int) -> Iterator[tuple[int, int]]:
    """Candidates for an error budget, in order: finer groups, then 8 bits from per-channel on."""
    candidates = group_size_candidates(k, options.min_group_size)
    yield options.bits, group_size
    yield from ((options.bits, size) for size in candidates if size < group_size)
    if options.bits < INT8.bits:
        yield from ((INT8.bits, size) for size in candidates)


def _deliver(
    w: torch.Tensor,
    qtype: QType,
    group_size: int,
    method: str,
    scale_dtype: torch.dtype,
    h: Sequence[torch.Tensor | None],
) -> tuple[QuantPlan, QuantizedTensor]:
    """w quantized at this group size, and the plan with the resulting errors."""
    n, k = w.shape[-2:]
    matrices = [w] if w.dim() == 2 else w.unbind()
    shape = (*w.shape[:-1], packed_columns(qtype, k))
    qweight = torch.empty(shape, dtype=qtype.storage_dtype, device=w.device)

    def scales_in(dtype: torch.dtype) -> list[torch.Tensor]:
        pairs = zip(matrices, h, strict=True)
        return [choose_scale(m, qtype, group_size, method, dtype, own) for m, own in pairs]

    scales = scales_in(scale_dtype)
    if len({scale.dtype for scale in scales}) > 1:  # 16 bits cannot hold those of some expert
        scales = scales_in(torch.float32)
    parts = zip(matrices, scales, qweight.view(-1, n, shape[-1]), strict=True)
    norms = [encode(m, scale, qtype, group_size, codes) for m, scale, codes in parts]
    errors = tuple(map(relative_error_from, norms)) if w.dim() == 3 else ()
    whole = relative_error_from(torch.cat(norms))
    plan = QuantPlan(
        qtype.bits, group_size, method, scales[0].dtype, whole, errors, levels=qtype.levels
    )
    scale = scales[0] if w.dim() == 2 else torch.stack(scales)
    experts = len(matrices) if w.dim() == 3 else 0
    return plan, QuantizedTensor(qweight, scale, plan.form(n, k, experts))
