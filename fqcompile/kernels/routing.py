"""Which rows of x go to which expert: consecutive runs that end at `offsets`, or one id a row.

grouped    x sorted by expert; expert e has the rows offsets[e-1] to offsets[e]; those from the
           last offset on belong to no expert and are neither read nor written
gathered   row p goes to expert ids[p]; a negative id counts from the last expert, as in W[ids]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise

import torch
from torch import Tensor

from fqcompile.kernels.launch_table import Config
from fqcompile.kernels.template import ExpertsFn, LinearFn, PackedLinear


@dataclass(frozen=True)
class Routing:
    """Exactly one of the two is given: offsets [E], or ids [M], of int32 or int64."""

    offsets: Tensor | None = None
    ids: Tensor | None = None

    def rows_of_experts(self, experts: int, m: int) -> Iterator[tuple[int, slice | Tensor]]:
        """Each expert that has rows, with them. Reads the routing on the host.

        Raises:
            IndexError: an id names no expert, or offsets fall or pass the rows there are.
        """
        if self.offsets is not None:
            yield from _runs(self.offsets.tolist(), m)
            return
        assert self.ids is not None
        rows: dict[int, list[int]] = {}
        for row, index in enumerate(self.ids.tolist()):
            if not -experts <= index < experts:
                raise IndexError(
                    f"ids[{row}] is {index}; the weight has {experts} experts, so ids must be from "
                    f"{-experts} to {experts - 1}"
                )
            rows.setdefault(index % experts, []).append(row)
        for expert, own in sorted(rows.items()):
            yield expert, _as_rows(own)


def _runs(ends: list[int], m: int) -> Iterator[tuple[int, slice]]:
    bounds = [0, *ends]
    falls = next((i for i, (a, b) in enumerate(pairwise(bounds)) if b < a), None)
    if falls is not None or bounds[-1] > m:
        where = f"offsets[{falls}] falls" if falls is not None else f"the last is over {m}"
        raise IndexError(
            f"offsets must rise from 0 to at most the {m} rows of x; {where} in {ends}"
        )
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield expert, slice(start, end)


def _as_rows(rows: list[int]) -> slice | Tensor:
    """A slice where the rows are neighbours: reading one makes no copy."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows)


def expert_of(weight: PackedLinear, expert: int) -> PackedLinear:
    """One expert of packed stacks qweight [E, ...] and scale [E, ...]; a view."""
    return weight._replace(qweight=weight.qweight[expert], scale=weight.scale[expert])


def one_by_one(linear: LinearFn) -> ExpertsFn:
    """Experts by a kernel for one matrix: reads those alone that have rows."""

    @wraps(linear)
    def experts(
        x: Tensor,
        weight: PackedLinear,
        offsets: Tensor | None,
        ids: Tensor | None,
        bias: Tensor | None,
        activation: str,
        gated: bool,
        config: Config | None,
    ) -> Tensor:
        y = x.new_empty(x.shape[0], weight.rows // 2 if gated else weight.rows)
        routing = Routing(offsets, ids)
        for expert, rows in routing.rows_of_experts(weight.qweight.shape[0], x.shape[0]):
            own = None if bias is None else bias[expert]
            one = expert_of(weight, expert)
            y[rows] = linear(x[rows], one, own, None, activation, gated, config)
        return y

    return experts
