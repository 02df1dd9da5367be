"""Granularity: candidate group sizes of a matrix, and the rules that choose among them."""

import math
from collections.abc import Callable, Sequence

import torch

from fqcompile.config import SiteOptions
from fqcompile.quant import native_quantizer, scale_search
from fqcompile.tensor.chunks import each_chunk, grouped, halving_sum
from fqcompile.tensor.format import INT8, num_groups, qtype_for

# An error that needs no finer groups, and no comparison of what they would cost.
GOOD_ENOUGH = 0.01
# Bits that half the error is worth. In real matrices, errors weighted, log2(error) falls by 1.0 for
# a bit from 128 to 64, and by .67 from 64 to 32 (Gemma 3 270M 1.05 and .68, MiniLM .99 and .66; of
# normal weights .78 and .53). At 1 they would be at the border of 128 and 64, and what tips one
# says little about the model: such choices are 4 % worse than one size for all at the same bits on
# MiniLM, 4 % better on Gemma. Here all of these get 64, also the small trained models that are
# nearly normal, and which at 1.25 lost 8 to 15 % by 128. At 1.6 a third of Gemma would get 32.
WORTH = 1.4


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
    w: torch.Tensor,
    candidates: Sequence[int],
    options: SiteOptions,
    scale_bits: int,
    h: torch.Tensor | None = None,
) -> int:
    """The rate-distortion rule: what an error costs is weighed against the bits that it saves,

        WORTH log2(relative_error(g)) + bits_per_weight(g).

    The coarsest group size that is GOOD_ENOUGH wins; else the lowest cost, the coarser of a tie.
    Sizes are looked at from the finest on, until none that is left could win even if its error
    were no larger than the last one's. With `h` [K], squares are weighted in both norms of the
    relative error.
    """

    def error_of(size: int) -> float:
        return estimate_errors(w, [size], options, h)[0]

    if options.bits == INT8.bits and error_of(candidates[0]) <= GOOD_ENOUGH:
        return candidates[0]  # most int8 matrices are decided here, in one look
    n, k = w.shape
    least_stored = bits_per_weight(options.bits, n, k, candidates[0], scale_bits)
    chosen, lowest = candidates[-1], math.inf
    for size in reversed(candidates):
        error = error_of(size)
        if error <= GOOD_ENOUGH:
            chosen, lowest = size, -math.inf
            continue
        worth = WORTH * math.log2(error)
        cost = worth + bits_per_weight(options.bits, n, k, size, scale_bits)
        if cost <= lowest:
            chosen, lowest = size, cost
        if worth + least_stored > lowest:
            break
    return chosen


def range_rule(
    w: torch.Tensor,
    candidates: Sequence[int],
    options: SiteOptions,
    scale_bits: int,
    h: torch.Tensor | None = None,
) -> int:
    """The paper's rule: go on to finer groups while the mean absmax shrinks below alpha times.

    `alpha` is meant for a halving of the group size; a step of several halvings, from K to its
    largest power of two, must shrink by alpha to that power. With `h` [K], a group counts as much
    as the sum of its h.
    """
    ranges = mean_ranges(w, candidates, h)
    for i in range(len(candidates) - 1):
        halvings = math.log2(candidates[i] / candidates[i + 1])
        if ranges[i + 1] >= options.alpha**halvings * ranges[i]:
            return candidates[i]
    return candidates[-1]


Rule = Callable[[torch.Tensor, Sequence[int], SiteOptions, int, torch.Tensor | None], int]
RULES: dict[str, Rule] = {"adaptive": adaptive_rule, "range": range_rule}


def estimate_errors(
    w: torch.Tensor,
    candidates: Sequence[int],
    options: SiteOptions,
    h: torch.Tensor | None = None,
) -> list[float]:
    """The relative error of all of w [N, K] under each candidate, too high by 4% at most.

    `h` [K] are weights of squares, or None for 1.
    """
    method, qtype = options.scale_method, qtype_for(options.bits, options.levels)
    by = native_quantizer if native_quantizer.takes(w) else scale_search
    sums = by.row_errors(w, method, qtype, candidates, h)
    total, *errors = halving_sum(sums).tolist()
    return [math.sqrt(error / total) if total else 0.0 for error in errors]


def mean_ranges(
    w: torch.Tensor, candidates: Sequence[int], h: torch.Tensor | None = None
) -> list[float]:
    """The mean absmax of the groups of w [N, K] under each candidate, weighted by sums of h [K]."""
    n, k = w.shape
    shares = [
        torch.full((num_groups(k, g),), 1 / num_groups(k, g), dtype=torch.float64, device=w.device)
        if h is None
        else grouped(h[None], g)[0].double().sum(-1) / h.double().sum()
        for g in candidates
    ]

    def ranges(rows: slice) -> torch.Tensor:
        magnitudes = w[rows].float().abs()
        sums = [
            (grouped(magnitudes, g).amax(-1) * share).sum()
            for g, share in zip(candidates, shares, strict=True)
        ]
        return torch.stack(sums)

    sums = torch.stack(each_chunk(ranges, w)).sum(0)
    return [s / n for s in sums.tolist()]
