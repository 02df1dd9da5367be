"""Find the step (scale) of a group that minimizes its squared error.

Divided by its extreme (the weight of largest magnitude), a group becomes u in [-1, 1], the extreme
at -1. The error of one u under one candidate step,

    f_c(u) = (u - c * nearest level(u / c))^2,

is then the same function for every group of every matrix. So f is tabulated once, u is sorted into
bins, and one look-up per weight sums the errors of all candidates at a time. The best one is
refined by least squares: for fixed levels v, the step sum(u v) / sum(v^2) is optimal. Weights h of
squared errors stand in each of these sums.
"""

from functools import lru_cache

import torch
from torch.nn.functional import embedding_bag

from fqcompile.quant.rounding import nearest_levels
from fqcompile.tensor.chunks import grouped, plain_tensors
from fqcompile.tensor.format import QType

# Steps that put the extreme on the negative side, which has one code more, and on the other side.
_CANDIDATES = 33, 14
_SAMPLES_PER_BIN = 8
_REFITS = 2
# Keeps 1 / pivot times the number of bins finite in float32.
_LEAST_PIVOT = 2.0**-110


def signed_extremes(groups: torch.Tensor, h: torch.Tensor | None = None) -> torch.Tensor:
    """The weight of largest magnitude in each group [..., g] -> [...]; of a tie, the negative.

    Of those with h > 0: how the others are rounded does not matter.
    """
    counted = groups if h is None else groups * (h > 0)
    low, high = counted.amin(-1), counted.amax(-1)
    return torch.where(-low >= high, low, high)


def group_weights(h: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of squared errors h [K] as float32 groups [G, g], and float64 factors [G, 1].

    Their product is h. The largest of a group is 1 to 2, so that sums of products stay far from the
    ends of float32. Where a group's h is zero throughout, all its weights are 1 and its factor 0.
    """
    groups = grouped(h[None], group_size)[0]
    largest = groups.amax(-1, keepdim=True)
    factors = torch.exp2(torch.frexp(largest).exponent.double() - 1)
    weights = torch.where(largest > 0, (groups.double() / factors).float(), 1.0)
    return weights, torch.where(largest > 0, factors, 0.0)


def search_scale(
    groups: torch.Tensor, extremes: torch.Tensor, qtype: QType, h: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales [N, G] of the groups [N, G, g], of either sign, unrounded; h [G, g] or None for 1."""
    pivots = _pivots(extremes)
    u = groups / pivots[..., None]
    steps = _best_candidate(u, "mse", qtype, h)
    for _ in range(_REFITS):
        steps = _refit(u, steps, qtype, h)
    return steps * pivots


def estimate_squared_error(
    groups: torch.Tensor, method: str, qtype: QType, h: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error of each group of [N, G, g] under its best candidate, float64 [N, G].

    `h` [G, g] are weights of squared errors, or None for 1.

    What `choose_scale` delivers is a little lower with "mse", because refits follow there.
    """
    pivots = _pivots(signed_extremes(groups, h))
    u = groups / pivots[..., None]
    steps = _best_candidate(u, method, qtype, h)[..., None]
    # Bins would blur the error of a group whose weights are all tiny beside its extreme.
    errors = nearest_levels(u / steps, qtype).mul_(steps).sub_(u).square_()
    sums = (errors if h is None else errors.mul_(h)).sum(-1)
    return sums.double() * pivots.double().square()


def search_share(group_size: int) -> float:
    """How much smaller a piece of work should be: tiny groups have as many candidates as others."""
    return min(1.0, group_size / 32)


def candidate_steps(method: str, qtype: QType) -> torch.Tensor:
    """Steps tried on a group whose extreme is -1, in float64."""
    low, high = -qtype.values[0], qtype.values[-1]
    if method == "absmax":
        return torch.tensor([-1 / high], dtype=torch.float64, device="cpu")
    down, up = _CANDIDATES
    # Both ends at 1 of their range: there the extreme has the outermost code exactly.
    negative = torch.linspace(qtype.least_step, 1, down, dtype=torch.float64, device="cpu")
    least_up = 1 - (1 - qtype.least_step) / 2
    if qtype.sixteenths is not None:  # levels that differ on both sides: the sign always counts
        least_up, up = qtype.least_step, down
    positive = torch.linspace(least_up, low / high, up, dtype=torch.float64, device="cpu")
    # Half a code coarser still: refits come back from there.
    beyond = torch.tensor([1 + 0.5 / low], dtype=torch.float64, device="cpu")
    return torch.cat([negative, beyond, -positive]) / low


@lru_cache(maxsize=16)
@plain_tensors()
def _error_table(
    method: str, qtype: QType, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate steps c [C], and f_c [bins + 1, C]; bins are centered at -1, ..., 1 and averaged.

    But the first holds the extreme of each group, and little else: there f_c(-1) is exact.
    """
    bins = _bins(qtype)
    samples = torch.arange((bins + 1) * _SAMPLES_PER_BIN, dtype=torch.float64, device="cpu")
    u = (((samples + 0.5) / _SAMPLES_PER_BIN - 0.5) * 2 / bins - 1)[:, None]
    u[:_SAMPLES_PER_BIN] = -1
    steps = candidate_steps(method, qtype)
    levels = nearest_levels(u / steps, qtype).double()
    errors = (u - levels * steps).square_().view(bins + 1, _SAMPLES_PER_BIN, -1).mean(1)
    return steps.float().to(device), errors.float().to(device)


def _bins(qtype: QType) -> int:
    return 256 * qtype.bits


def _pivots(extremes: torch.Tensor) -> torch.Tensor:
    return torch.where(extremes.abs() < _LEAST_PIVOT, _LEAST_PIVOT, -extremes)


def _best_candidate(
    u: torch.Tensor, method: str, qtype: QType, h: torch.Tensor | None
) -> torch.Tensor:
    """The candidate step of least error for each group of u [N, G, g] -> [N, G]."""
    half = _bins(qtype) / 2
    bins = (u * half).add_(half + 0.5).int()
    # Weights that do not count may lie beyond the extreme, and those that are written to meanwhile.
    bins.clamp_(0, _bins(qtype))
    steps, table = _error_table(method, qtype, u.device)
    weights = None if h is None else h.expand(u.shape).reshape(-1, u.shape[-1])
    errors = embedding_bag(bins.flatten(0, -2), table, mode="sum", per_sample_weights=weights)
    return steps[errors.argmin(-1)].view(u.shape[:-1])


def _refit(
    u: torch.Tensor, steps: torch.Tensor, qtype: QType, h: torch.Tensor | None
) -> torch.Tensor:
    levels = nearest_levels(u / steps[..., None], qtype)
    weighted = levels if h is None else levels * h
    dot = (u * weighted).sum(-1)
    energy = (weighted * levels).sum(-1)
    return torch.where(energy > 0, dot / energy, steps)
