"""Right first, then timed: errors that two right ways may have, and times of alternatives in turn.

In turn, so that what changes meanwhile, such as clocks, meets all of them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from math import sqrt

import torch
from torch import Tensor

from bench.core.results import Row, failure
from fqcompile.kernels.tuning.measure import WrongResult, captured, replayed, rounds_of, timing_of
from fqcompile.kernels.tuning.table import Timing

ROUNDS, WARM_UPS, REPLAYS = 5, 2, 5
LEASE = 540.0  # seconds; of the ten minutes of a lease, the rest is for starting and writing
# Each size of a layer, or batch of a model, is a compilation of its own of one function.
MANY_COMPILATIONS = {"recompile_limit": 4096, "accumulated_recompile_limit": 4096}
# Results that are rounded one after another in a layer: norm, q/k/v, scores, softmax, values, out,
# sum, norm, up, activation, down, sum.
CHAIN = 12
# Random weights quantized to 4 bits by any rule are a tenth of their size off, and so is a model of
# few layers some times that.
_LOOSELY = 0.6

# (warm-ups that do not count, replays) -> microseconds of a call, for each replay.
Replay = Callable[[int, int], list[float]]
Reasons = dict[str, str]  # why something has no time, by its name
Record = Callable[[Sequence[Callable[[], object]]], Replay]


def recorded_on_gpu(calls: Sequence[Callable[[], object]]) -> Replay:
    """Replays of a CUDA graph of `calls` in turn, each of which reads a weight of its own."""
    for call in calls:  # compiles what is still to be compiled, for nothing may while capturing
        call()
    torch.cuda.synchronize()
    rounds = rounds_of(len(calls))
    graph = captured(lambda: [call() for call in calls], rounds)

    def replay(warm_ups: int, replays: int) -> list[float]:
        times = replayed(graph, warm_ups, replays)
        return [microseconds / (rounds * len(calls)) for microseconds in times]

    return replay


def recorded_on_cpu(calls: Sequence[Callable[[], object]]) -> Replay:
    """Single calls, one after the other in a circle, each of which reads a weight of its own."""
    in_turn = cycle(calls)

    def replay(warm_ups: int, replays: int) -> list[float]:
        for _ in range(warm_ups):
            next(in_turn)()
        return [_microseconds(next(in_turn)) for _ in range(replays)]

    return replay


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def timings(replays: Mapping[str, Replay]) -> dict[str, Timing]:
    """Of each alternative, over ROUNDS * REPLAYS replays; between two rounds run the others."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            times[name] += replay(WARM_UPS, REPLAYS)
    return {name: timing_of(found) for name, found in times.items()}


def timed_if_right(ways: Mapping[str, Callable[[], Replay]]) -> tuple[dict[str, Timing], Reasons]:
    """The times of the ways that are right, in turn, and why the others have none.

    Each is called once: it compares its result with what must come out, raises where that is
    another, and returns its replays.
    """
    replays: dict[str, Replay] = {}
    failures: Reasons = {}
    for name, prepare in ways.items():
        try:
            replays[name] = prepare()
        except Exception as error:
            failures[name] = failure(error)
    return timings(replays), failures


def microseconds(timing: Timing) -> Row:
    """As the rows of layers have it."""
    return {"us": timing.microseconds, "low": timing.low, "high": timing.high}


def allowed_error(dtype: torch.dtype, layers: int) -> float:
    """The largest ‖y - ŷ‖ / ‖ŷ‖ between two right ways to run a model.

    Each result of CHAIN * layers is rounded, twice at most, to half an ulp u: u/√3 in the mean
    square, independently, in both: √(4 * CHAIN * layers / 3) u. Twice that.
    """
    return 2 * sqrt(4 * CHAIN * layers / 3) * torch.finfo(dtype).eps / 2


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def same_logits(row: Row, before: Sequence[Row], layers: int) -> Row:
    """The row, with its error against the first of those `before` it.

    Each has "way", "ours" and "logits".

    Raises:
        WrongResult: they are not those of the plain model to 4 bits, or of our other ways exactly
            to rounding.
    """
    logits = torch.tensor(row["logits"], dtype=torch.float64)
    for other in before:
        if "logits" not in other:
            continue
        expected = torch.tensor(other["logits"], dtype=torch.float64)
        error = relative_error(logits, expected)
        alike = row["ours"] and other["ours"]
        allowed = allowed_error(torch.bfloat16, layers) if alike else _LOOSELY
        if not error <= allowed:
            raise WrongResult(f"{error:.2g} from {other['way']}, allowed {allowed:.2g}")
        row["error"] = row.get("error", error)
    return row
