"""Granularity: candidate group sizes of a matrix, and the rules that choose among them."""

import math
from collections.abc import Callable, Sequence

import torch

from fqcompile.config import SiteOptions
from fqcompile.quant.scale_search import estimate_squared_error, search_share
from fqcompile.tensor.chunks import each_chunk, grouped
from fqcompile.tensor.format import num_groups, qtype_for

# An error that needs no finer groups, and no comparison of what they would cost.
GOOD_ENOUGH = 0.01


def group_size_candidates(k: int, min_group_size: int) -> tuple[int, ...]:
    """Candidate group sizes, coarsest first: K (per-channel scales), then powers of two.

    Powers of two that do not divide K would leave a short last group; they are offered only where
    no power of two from `min_group_size` up divides K.

        (384, 32) -> (384, 128, 64, 32)        (100, 32) -> (100, 64, 32)
    """
    powers = [2**e for e in reversed(range(k.bit_length())) if min_group_size <= 2**e < k]
    divisors = [g for g in powers if k % g == 0]
    return (k, *(divisors or powers))


def bits_per_weight(bits: int, n: int, k: int, group_size: int, scale_bits: int) -> float:
    """Stored bits of an N x K weight, scales and the padding of rows to whole bytes included."""
    row_bits = 8 * -(-k * bits // 8) + scale_bits * num_groups(k, group_size)
    return n * row_bits / (n * k)


def adaptive_rule(
    w: torch.Tensor, candidates: Sequence[int], options: SiteOptions, scale_bits: int
) -> int:
    """The rate-distortion rule. One more bit halves the rounding error, so the cost is

        log2(relative_error(g)) + bits_per_weight(g).

    The coarsest group size that is GOOD_ENOUGH wins; else the lowest cost, the coarser of a tie.
    """
    costs = {}
    n, k = w.shape
    errors = estimate_errors(w, candidates[:1], options)
    if errors[0] > GOOD_ENOUGH:  # else most int8 matrices are decided here, in one look
        errors += estimate_errors(w, candidates[1:], options)
    for size, error in zip(candidates, errors, strict=False):
        if error <= GOOD_ENOUGH:
            return size
        costs[size] = math.log2(error) + bits_per_weight(options.bits, n, k, size, scale_bits)
    return min(costs, key=lambda size: costs[size])


def range_rule(
    w: torch.Tensor, candidates: Sequence[int], options: SiteOptions, scale_bits: int
) -> int:
    """The paper's rule: go on to finer groups while the mean absmax shrinks below alpha times.

    `alpha` is meant for a halving of the group size; a step of several halvings, from K to its
    largest power of two, must shrink by alpha to that power.
    """
    ranges = mean_ranges(w, candidates)
    for i in range(len(candidates) - 1):
        halvings = math.log2(candidates[i] / candidates[i + 1])
        if ranges[i + 1] >= options.alpha**halvings * ranges[i]:
            return candidates[i]
    return candidates[-1]


Rule = Callable[[torch.Tensor, Sequence[int], SiteOptions, int], int]
RULES: dict[str, Rule] = {"adaptive": adaptive_rule, "range": range_rule}


def estimate_errors(
    w: torch.Tensor, candidates: Sequence[int], options: SiteOptions
) -> list[float]:
    """The relative error of all of w [N, K] under each candidate, too high by 2% at most."""
    method, qtype = options.scale_method, qtype_for(options.bits, options.levels)

    def squares(rows: slice) -> torch.Tensor:
        chunk = w[rows].float()
        errors = (estimate_squared_error(grouped(chunk, g), method, qtype) for g in candidates)
        return torch.stack([chunk.double().square_().sum(), *errors])

    sums = torch.stack(each_chunk(squares, w, search_share(min(candidates)))).sum(0)
    total, *errors = sums.tolist()
    return [math.sqrt(error / total) if total else 0.0 for error in errors]


def mean_ranges(w: torch.Tensor, candidates: Sequence[int]) -> list[float]:
    """The mean absmax of the groups of w [N, K] under each candidate."""

    def ranges(rows: slice) -> torch.Tensor:
        magnitudes = w[rows].float().abs()
        sums = [grouped(magnitudes, g).amax(-1).double().sum() for g in candidates]
        return torch.stack(sums)

    sums = torch.stack(each_chunk(ranges, w)).sum(0)
    n, k = w.shape
    return [s / (n * num_groups(k, g)) for s, g in zip(sums.tolist(), candidates, strict=True)]
