"""How to quantise a matrix, decided from its weights alone, and doing it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.quant.affine import choose_scale, dequantize_affine, quantize_affine
from fqcompile.quant.chunks import each_chunk, plain_tensors
from fqcompile.quant.fidelity import relative_error_from, squared_norms
from fqcompile.quant.granularity import group_size_candidates
from fqcompile.quant.packing import pack, packed_columns
from fqcompile.quant.qtype import INT8, QTYPES, QType
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.quant.rules import RULES
from fqcompile.quant.validate import check_quantizable


@dataclass(frozen=True)
class QuantPlan:
    """How one matrix is quantised, and the error that this delivers on the whole of it."""

    bits: int
    group_size: int
    scale_method: str
    scale_dtype: torch.dtype
    relative_error: float


@plain_tensors()
def choose_and_quantize(
    w: torch.Tensor, options: SiteOptions, scale_dtype: torch.dtype
) -> tuple[QuantPlan, QuantizedWeight]:
    """Bits, group size and scale type of w [N, K], and w quantised so; deterministic.

    Raises UnquantizableWeight, whose text is the reason for the report.
    """
    check_quantizable(w)
    group_size = _first_group_size(w, options, scale_dtype)
    budget = math.inf if options.error_budget is None else options.error_budget
    plans = []
    for bits, size in _attempts(options, group_size, w.shape[1]):
        plan, weight = _deliver(w, QTYPES[bits], size, options.scale_method, scale_dtype)
        if plan.relative_error <= budget:
            return plan, weight
        plans.append(plan)
    best = min(plans, key=lambda plan: plan.relative_error)
    raise UnquantizableWeight(
        f"error_budget {budget:g} cannot be met: the best relative error is "
        f"{best.relative_error:.3g}, at {best.bits} bits and group size {best.group_size}; "
        "raise error_budget or lower min_group_size"
    )


def choose_plan(w: torch.Tensor, options: SiteOptions, scale_dtype: torch.dtype) -> QuantPlan:
    """The plan of `choose_and_quantize` alone."""
    return choose_and_quantize(w, options, scale_dtype)[0]


@plain_tensors()
def quantize_weight(w: torch.Tensor, plan: QuantPlan) -> QuantizedWeight:
    """w [N, K] quantised as planned, in fresh ordinary tensors on the device of w."""
    check_quantizable(w)
    qtype = QTYPES[plan.bits]
    return _deliver(w, qtype, plan.group_size, plan.scale_method, plan.scale_dtype)[1]


def _first_group_size(w: torch.Tensor, options: SiteOptions, scale_dtype: torch.dtype) -> int:
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
    return RULES[granularity](w, candidates, options, torch.finfo(scale_dtype).bits)


def _attempts(options: SiteOptions, group_size: int, k: int) -> Iterator[tuple[int, int]]:
    """What an error budget tries in turn: finer groups, then 8 bits from column to finest."""
    candidates = group_size_candidates(k, options.min_group_size)
    yield options.bits, group_size
    yield from ((options.bits, size) for size in candidates if size < group_size)
    if options.bits < INT8.bits:
        yield from ((INT8.bits, size) for size in candidates)


def _deliver(
    w: torch.Tensor, qtype: QType, group_size: int, method: str, scale_dtype: torch.dtype
) -> tuple[QuantPlan, QuantizedWeight]:
    """w quantised at this group size, and the plan with the error that this has on all of w."""
    n, k = w.shape
    scale = choose_scale(w, qtype, group_size, method, scale_dtype)
    qweight = torch.empty(n, packed_columns(qtype, k), dtype=qtype.storage_dtype, device=w.device)

    def encode(rows: slice) -> torch.Tensor:
        codes = quantize_affine(w[rows], scale[rows], qtype, group_size)
        qweight[rows] = pack(codes, qtype)
        w_hat = dequantize_affine(codes, scale[rows], group_size, torch.float32)
        return squared_norms(w[rows], w_hat)

    error = relative_error_from(each_chunk(encode, w))
    plan = QuantPlan(qtype.bits, group_size, method, scale.dtype, error)
    return plan, QuantizedWeight(qweight, scale, qtype.bits, group_size, (n, k))
