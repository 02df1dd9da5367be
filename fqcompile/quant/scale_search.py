"""Find the step (scale) of a group that minimizes its squared error.

Divided by its extreme (the weight of largest magnitude), a group becomes u in [-1, 1], the extreme
at -1. The error of one u under one candidate step,

    f_c(u) = (u - c * nearest level(u / c))^2,

is then the same function for every group of every matrix. So f is tabulated once, u is sorted into
bins, and one look-up per weight sums the errors of all candidates at a time. The best one is
refined by least squares: for fixed levels v, the step sum(u v) / sum(v^2) is optimal. Weights h of
squared errors stand in each of these sums.

native/quantize.cpp does the same where it can, bit for bit: what changes here changes there. Hence
sums have a fixed order: those of candidates run over SEGMENT weights one after the other, as
`embedding_bag` adds them, and then by halves; all others by halves.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn.functional import embedding_bag, pad

from fqcompile.quant.rounding import nearest_levels
from fqcompile.tensor.chunks import each_chunk, grouped, halving_sum, plain_tensors
from fqcompile.tensor.format import UNIFORM, QType

# Steps that put the extreme on the negative side, which has the larger level, and on the other one;
# with one more they are 32, two vectors of AVX-512. Where levels differ on both sides, the sign of
# a step always counts. The error is .1 (uniform) to .3 % (normal) above that of twice as many.
_CANDIDATES = {UNIFORM: (22, 9)}
_CANDIDATES_OF_BOTH_SIGNS = 16, 15
SEGMENT = 32
REFITS = 2
_BINS = {4: 512, 8: 2048}
_SAMPLES_PER_BIN = 8
# Keeps 1 / pivot times the number of bins finite in float32.
_LEAST_PIVOT = 2.0**-110


def signed_extremes(groups: torch.Tensor) -> torch.Tensor:
    """The weight of largest magnitude in each group [..., g] -> [...]; of a tie, the negative."""
    low, high = groups.amin(-1), groups.amax(-1)
    return torch.where(-low >= high, low, high)


def group_weights(h: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of squared errors h [K] as float32 groups [G, g], and float64 factors [G].

    Their product is h. The largest of a group is 1 to 2, so that sums of products stay far from the
    ends of float32. Where a group's h is zero throughout, all its weights are 1 and its factor 0.
    """
    groups = grouped(h[None], group_size)[0]
    largest = groups.amax(-1)
    factors = torch.exp2(torch.frexp(largest).exponent.double() - 1)
    weights = (groups.double() / factors[:, None]).float()
    weights.masked_fill_(largest[:, None] == 0, 1)
    return weights, factors.masked_fill_(largest == 0, 0)


def counted_groups(w: torch.Tensor, group_size: int, h: torch.Tensor | None) -> torch.Tensor:
    """w [N, K] in groups [N, G, g], with zeros where h [G, g] is zero: these do not count."""
    groups = grouped(w, group_size)
    return groups if h is None else torch.where(h > 0, groups, 0.0)


def search_scale(
    groups: torch.Tensor, extremes: torch.Tensor, qtype: QType, h: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales [N, G] of the groups [N, G, g], of either sign, unrounded; h [G, g] or None for 1."""
    pivots = _pivots(extremes)
    u = groups / pivots[..., None]
    steps = _best_candidate(u, "mse", qtype, h)
    for _ in range(REFITS):
        steps = _refit(u, steps, qtype, h)
    return steps * pivots


def estimate_squared_error(
    groups: torch.Tensor, method: str, qtype: QType, h: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error of each group of [N, G, g] under its best candidate, float64 [N, G].

    `h` [G, g] are weights of squared errors, or None for 1. What `choose_scale` delivers is a
    little lower with "mse", because refits follow there.
    """
    pivots = _pivots(signed_extremes(groups))
    u = groups / pivots[..., None]
    steps = _best_candidate(u, method, qtype, h)[..., None]
    # Bins would blur the error of a group whose weights are all tiny beside its extreme.
    errors = nearest_levels(u * steps.reciprocal(), qtype).mul_(steps).sub_(u).square_()
    sums = halving_sum(errors if h is None else errors.mul_(h))
    return sums.double() * pivots.double().square()


def row_errors(
    w: torch.Tensor,
    method: str,
    qtype: QType,
    candidates: Sequence[int],
    h: torch.Tensor | None,
) -> torch.Tensor:
    """sum h w^2 of each row of w [N, K], then the sum of h (w - ŵ)^2 for each candidate's groups.

    float64 [1 + candidates, N]; h [K] are weights of squares, or None for 1.
    """
    weights = [(None, None) if h is None else group_weights(h, size) for size in candidates]

    def of_rows(rows: slice) -> torch.Tensor:
        chunk = w[rows].float()
        squares = chunk.double().square_()
        sums = [halving_sum(squares if h is None else squares.mul_(h.double()))]
        for size, (own, factors) in zip(candidates, weights, strict=True):
            groups = counted_groups(chunk, size, own)
            errors = estimate_squared_error(groups, method, qtype, own)
            sums.append(halving_sum(errors if factors is None else errors.mul_(factors)))
        return torch.stack(sums)

    return torch.cat(each_chunk(of_rows, w, search_share(min(candidates))), -1)


def search_share(group_size: int) -> float:
    """How much smaller a piece of work should be: tiny groups have as many candidates as others."""
    return min(1.0, group_size / 32)


def candidate_steps(method: str, qtype: QType) -> torch.Tensor:
    """Steps tried on a group whose extreme is -1, in float64."""
    low, high = -qtype.values[0], qtype.values[-1]
    if method == "absmax":
        return torch.tensor([-1 / high], dtype=torch.float64, device="cpu")
    down, up = _CANDIDATES.get(qtype.levels, _CANDIDATES_OF_BOTH_SIGNS)
    least_up = 1 - (1 - qtype.least_step) / 2 if qtype.levels == UNIFORM else qtype.least_step
    # Both ends at 1 of their range: there the extreme has the outermost code exactly.
    negative = torch.linspace(qtype.least_step, 1, down, dtype=torch.float64, device="cpu")
    positive = torch.linspace(least_up, low / high, up, dtype=torch.float64, device="cpu")
    # Half a code coarser still: refits come back from there.
    beyond = torch.tensor([1 + 0.5 / low], dtype=torch.float64, device="cpu")
    return torch.cat([negative, beyond, -positive]) / low


@lru_cache(maxsize=16)
@plain_tensors()
def error_table(
    method: str, qtype: QType, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate steps c [C], and f_c [bins + 2, C]; bins are centered at -1, ..., 1 and averaged.

    But the first holds the extreme of each group, and little else: there f_c(-1) is exact. The last
    row is zero: what fills up a segment.
    """
    bins = _BINS[qtype.bits]
    samples = torch.arange((bins + 1) * _SAMPLES_PER_BIN, dtype=torch.float64, device="cpu")
    u = (((samples + 0.5) / _SAMPLES_PER_BIN - 0.5) * 2 / bins - 1)[:, None]
    u[:_SAMPLES_PER_BIN] = -1
    steps = candidate_steps(method, qtype)
    levels = nearest_levels(u / steps, qtype).double()
    errors = (u - levels * steps).square_().view(bins + 1, _SAMPLES_PER_BIN, -1).mean(1)
    return steps.float().to(device), pad(errors.float(), (0, 0, 0, 1)).to(device)


def _pivots(extremes: torch.Tensor) -> torch.Tensor:
    return torch.where(extremes.abs() < _LEAST_PIVOT, _LEAST_PIVOT, -extremes)


def _best_candidate(
    u: torch.Tensor, method: str, qtype: QType, h: torch.Tensor | None
) -> torch.Tensor:
    """The candidate step of least error for each group of u [N, G, g] -> [N, G]."""
    last = _BINS[qtype.bits]
    bins = (u * (last / 2)).add_(last / 2 + 0.5).int()
    # Of a weight that is written to meanwhile, values may lie beyond what was their extreme.
    bins.clamp_(0, last)
    weights = None if h is None else h.expand(u.shape)
    steps, table = error_table(method, qtype, u.device)
    segment = min(u.shape[-1], SEGMENT)
    if short := -u.shape[-1] % segment:
        bins = pad(bins, (0, short), value=last + 1)
        weights = None if weights is None else pad(weights, (0, short))
    errors = embedding_bag(
        bins.view(-1, segment),
        table,
        mode="sum",
        per_sample_weights=None if weights is None else weights.reshape(-1, segment),
    )
    sums = halving_sum(errors.view(*bins.shape[:-1], -1, len(steps)), -2)
    return steps[sums.argmin(-1)]


def _refit(
    u: torch.Tensor, steps: torch.Tensor, qtype: QType, h: torch.Tensor | None
) -> torch.Tensor:
    levels = nearest_levels(u * steps.reciprocal()[..., None], qtype)
    weighted = levels if h is None else levels * h
    dot, energy = halving_sum(u * weighted), halving_sum(weighted * levels)
    return torch.where(energy > 0, dot / energy, steps)
