"""GPTQ over a model, block by block: the second moments of the inputs of some weights at a time.

    while a block has more:   all batches   ->   H of the inputs of the next, as many as fit
                              each of these is rounded, gets codes by its H, and is packed
    all batches go on through the block

So a block's inputs have come through blocks that are packed, as they will from then on.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from fqcompile.distributed.shards import is_part
from fqcompile.errors import OptionError, ShardingError
from fqcompile.modules.calibrate import batches_of
from fqcompile.modules.inputs import Collect
from fqcompile.modules.weights import ModuleWeight
from fqcompile.options import one_of
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.choose import QuantPlan
from fqcompile.quant.gptq import compensate, factor_of, measured, refusal
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.disk_cache import LEAST_WEIGHTS, VERSION, Entry, disk_cache
from fqcompile.weights.fingerprint import content_digest, fingerprint

# Bytes of second moments at a time: those of all inputs of a layer of 4096 x 14336.
_BUDGET = 3 << 29
GPTQ = "gptq"
Run = Callable[[Iterable[ModuleWeight], Collect], None]
Part = tuple[ModuleWeight, int]  # a weight, and which of its experts; 0 for a matrix


class Inputs:
    """What the inputs X of one matrix were.

    Attributes:
        moments: Xᵀ X [K, K] in float32, until the factor is made of it.
        rows: those of X.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.moments = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, product: Tensor, rows: int) -> None:
        self.moments += product
        self.rows += rows

    def equals(self, other: "Inputs") -> bool:
        """Whether another matrix had the same, as those of q, k and v have."""
        same = self.rows == other.rows and self.moments.shape == other.moments.shape
        return same and torch.equal(self.moments, other.moments)

    @cached_property
    def refusal(self) -> str | None:
        """Why no codes are made by them."""
        return refusal(self.moments, self.rows)

    @cached_property
    def digest(self) -> str:
        return content_digest(self.moments.cpu())

    @cached_property
    def factor(self) -> Tensor:
        """Takes the place of the moments, whose digest and refusal are known."""
        assert {"digest", "refusal"} <= vars(self).keys()
        return factor_of(vars(self).pop("moments"))


def check_method(method: str, calibration: object) -> None:
    """Check the option `method` and that what is given to it can be inputs, before any change.

    Raises:
        OptionError: there is no such method, it is given no inputs, or these can be no batches.
    """
    is_gptq = one_of("scale", GPTQ)("method", method) == GPTQ
    if not (calibration is None or isinstance(calibration, str)):
        batches_of(calibration)  # draws none
    elif is_gptq:
        raise OptionError(
            f"option method is {GPTQ!r}, which needs your own inputs, and calibration is "
            f"{calibration!r}: give it batches of some thousand rows in all"
        )


def batches_for(
    method: str, calibration: object, weights: Iterable[ModuleWeight]
) -> Sequence[object] | None:
    """What the option `method` runs a model on; None where it is not GPTQ.

    Raises:
        OptionError: there is no such method, or it is given no inputs.
        ShardingError: a weight is sharded: ranks might run the model in other numbers of parts.
    """
    check_method(method, calibration)
    if method != GPTQ:
        return None
    for weight in weights:
        if is_part(weight.parameter):
            raise ShardingError(
                f"option method is {GPTQ!r}, and {weight.name} is sharded: call quantize_ and "
                "fqcompile.save on one device, and fqcompile.load on all"
            )
    return list(batches_of(calibration))


class WeightsInputs:
    """The inputs of some weights, found when they are asked for, in the order of weights.

    Args:
        run: of a model, or of a block, on its batches: `run(weights, collect)`.
        weights: all that will be asked for.
    """

    def __init__(self, run: Run, weights: Iterable[ModuleWeight]) -> None:
        self._run = run
        self._ahead = deque(part for weight in weights for part in _parts(weight))
        self._found: dict[tuple[str, int], Inputs] = {}

    def take(self, weight: ModuleWeight, expert: int) -> Inputs:
        """Those of one matrix, which are not kept here any longer."""
        key = weight.name, expert
        if key not in self._found:
            self._found.clear()
            self._found = self._collected(self._next((weight, expert)))
        return self._found.pop(key)

    def _next(self, first: Part) -> list[Part]:
        """This one and those behind it whose moments fit beside its own."""
        while self._ahead and _key(self._ahead.popleft()) != _key(first):
            pass
        parts, size = [first], _nbytes(first)
        while self._ahead and size + _nbytes(self._ahead[0]) <= _BUDGET:
            parts.append(self._ahead.popleft())
            size += _nbytes(parts[-1])
        return parts

    def _collected(self, parts: list[Part]) -> dict[tuple[str, int], Inputs]:
        found = {
            _key(part): Inputs(part[0].matrix.shape[-1], part[0].weight.device) for part in parts
        }
        product_of = _Products()

        def collect(weight: ModuleWeight, expert: int, x: Tensor) -> None:
            own = found.get((weight.name, expert))
            if own is not None:
                rows = x.reshape(-1, x.shape[-1])
                own.add(product_of(rows), len(rows))

        self._run({weight.name: weight for weight, _ in parts}.values(), collect)
        return _shared(found)


class _Products:
    """xᵀ x of each x, once where several matrices read the same one after the other."""

    def __init__(self) -> None:
        self._x = self._product = torch.empty(0)
        self._state: object = None

    def __call__(self, x: Tensor) -> Tensor:
        state = fingerprint((x,)), x.shape, x.stride(), x.dtype
        if state != self._state:
            self._x, self._state = x, state  # holds its memory, so nothing else gets its address
            values = x.float()
            self._product = values.T @ values
        return self._product


def _shared(found: dict[tuple[str, int], Inputs]) -> dict[tuple[str, int], Inputs]:
    """One object for matrices that follow each other and had the same inputs."""
    last: Inputs | None = None
    for key, inputs in found.items():
        if last is not None and inputs.equals(last):
            found[key] = last
        else:
            last = inputs
    return found


def _parts(weight: ModuleWeight) -> list[Part]:
    return [(weight, expert) for expert in range(len(_matrices(weight)))]


def _key(part: Part) -> tuple[str, int]:
    return part[0].name, part[1]


def _nbytes(part: Part) -> int:
    return 4 * part[0].matrix.shape[-1] ** 2


def _matrices(weight: ModuleWeight) -> Sequence[Tensor]:
    return weight.matrix.unbind() if weight.matrix.dim() == 3 else [weight.matrix]


def compensated(
    found: ModuleWeight, entry: Entry, inputs: WeightsInputs, budget: float | None
) -> Entry:
    """A rounded weight with codes by its inputs, expert by expert; its calibration says so.

    Where the error of these would be beyond the budget, or nothing is known of the inputs, as of
    those of weights of 8 bits, rounding stays.
    """
    plan, rounded = entry
    if plan.calibration is None:
        return _told(plan, f"no gptq: {plan.bits} bits have small errors anyway"), rounded
    weight = replace(rounded, qweight=rounded.qweight.clone())
    parts = weight.unbind() if weight.format.experts else [weight]
    refusals = []
    for expert, (w, part) in enumerate(zip(_matrices(found), parts, strict=True)):
        own = inputs.take(found, expert)
        if own.refusal is None:
            _find_or_compensate(w, part, own)
        else:
            refusals.append(own.refusal)
    if len(refusals) == len(parts):
        return _told(plan, f"no gptq: {refusals[0]}"), rounded
    made = measured(plan, found.matrix, weight)
    if budget is not None and made.worst_error > budget:
        error = f"its error {made.worst_error:.3g} is beyond error_budget {budget:g}"
        return _told(plan, f"no gptq: {error}"), rounded
    few = f", but not of {len(refusals)} of {len(parts)} experts: {refusals[0]}" if refusals else ""
    return _told(made, f"{GPTQ}{few}"), weight


def _told(plan: QuantPlan, done: str) -> QuantPlan:
    own = plan.calibration or Calibration(asked="batches")
    return replace(plan, calibration=replace(own, source=f"{own.source}; {done}"))


def _find_or_compensate(w: Tensor, weight: QuantizedTensor, inputs: Inputs) -> None:
    """`compensate` w [N, K] where no run before, which may have been interrupted, has done it.

    Results are kept for weights on a GPU too: to name them takes little of the time that GPTQ does.
    """

    digest = inputs.digest

    def make() -> Entry:
        compensate(w, weight, inputs.factor)
        return QuantPlan.of(weight.format, weight.scale.dtype), weight.to("cpu")

    found = disk_cache()
    if found is None or w.numel() < LEAST_WEIGHTS:
        make()
        return
    values = content_digest(w.cpu())
    form, scale = weight.format, content_digest(weight.scale.cpu())
    choice = form.bits, form.levels, form.group_size
    parts = [VERSION, torch.__version__, choice, values, scale, digest]
    key = sha256(json.dumps(parts).encode()).hexdigest()
    _, kept = found.get_or_make(key, make, lambda: content_digest(w.cpu()) == values)
    weight.qweight.copy_(kept.qweight)
