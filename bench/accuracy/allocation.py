"""What choosing a group size for each matrix can bring at all, beside one size for all.

Each matrix is quantised alone, with groups of 128, and the divergence that this causes is taken as
s (e / e_128)^2 at another size's relative error e: to second order the divergences of independent
roundings add up, each with the square of its error. So any assignment of sizes has a predicted
divergence, and so has the best one, which would need to know each s, that is to have data:

    minimise  sum_i s_i (e_i / e_i,128)^2 + lambda n_i b_i        over the sizes, for each lambda

with n weights of b bits. A rule that sees the weights alone has e and n.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from bench.accuracy.language_model import evaluate
from bench.accuracy.quantized import QuantisedWeight, ours
from bench.accuracy.rows import WAYS, Exact
from bench.accuracy.targets import ADAPTIVE, FIXED, mixed
from bench.core.results import Row

KNOWN = "int4 sensitivities known"
_ALONE = "int4 g128 mse"
_PRICES = [2.0**power for power in range(-40, 0)]  # lambda, of which the best fit is refined
_BISECTIONS = 30

Assignment = Sequence[QuantisedWeight]


@dataclass(frozen=True)
class Sensitivities:
    """Of the matrices of one model: the divergence in bits per byte of each one alone at g128."""

    alone: Assignment
    divergence: Sequence[float]

    @classmethod
    def of(cls, exact: Exact) -> "Sensitivities":
        alone = ours(exact.model, WAYS[_ALONE]).weights
        found = [_divergence(exact, w.name) for w in tqdm(alone, leave=False, disable=None)]
        return cls(alone, found)

    def predicted(self, assignment: Assignment) -> float:
        """The divergence of all matrices quantised as assigned."""
        together = zip(self.divergence, self.alone, assignment, strict=True)
        return sum(s * (w.error / alone.error) ** 2 for s, alone, w in together)

    def best(self, choices: Sequence[Assignment], bits: float) -> Assignment:
        """Of the assignments that a price makes best, that of most bits but no more than these."""
        low, high = _PRICES[0], _PRICES[-1]
        for _ in range(_BISECTIONS):
            price = (low * high) ** 0.5
            low, high = (low, price) if _bits(self._at(choices, price)) <= bits else (price, high)
        return self._at(choices, high)

    def _at(self, choices: Sequence[Assignment], price: float) -> Assignment:
        chosen = []
        for s, alone, *sizes in zip(self.divergence, self.alone, *choices, strict=True):
            cost = {
                w: s * (w.error / alone.error) ** 2 + price * w.elements * w.bits for w in sizes
            }
            chosen.append(min(cost, key=lambda w: cost[w]))
        return chosen


def _divergence(exact: Exact, name: str) -> float:
    only = {**WAYS[_ALONE], "include": [f"^{re.escape(name)}$"]}
    found = evaluate(ours(exact.model, only).model, exact.windows, exact.evaluation)
    return (found.divergence.sum() / found.bytes.sum()).item()


def _bits(assignment: Assignment) -> float:
    stored = sum(w.bits * w.elements for w in assignment)
    return stored / sum(w.elements for w in assignment)


def allocation_rows(exact: Exact) -> list[Row]:
    """The adaptive rule and the best assignment of no more bits, each beside mixed fixed sizes."""
    known = Sensitivities.of(exact)
    choices = [ours(exact.model, WAYS[way]).weights for way in FIXED]
    fixed = sorted((_bits(choice), known.predicted(choice)) for choice in choices)
    adaptive = ours(exact.model, WAYS[ADAPTIVE]).weights
    ways = {
        ADAPTIVE: adaptive,
        KNOWN: known.best(choices, _bits(adaptive)),
    }
    return [
        {
            "way": way,
            "bits_per_weight": _bits(assignment),
            "predicted": known.predicted(assignment),
            "fixed_groups": mixed(fixed, _bits(assignment)),
            "group_sizes": {w.name: w.group_size for w in assignment},
        }
        for way, assignment in ways.items()
    ]
