"""Times alternatives in turn, so that what changes meanwhile, such as clocks, meets all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import torch

from fqcompile.kernels.tuning.measure import captured, replayed, rounds_of, timing_of
from fqcompile.kernels.tuning.table import Timing

ROUNDS, WARM_UPS, REPLAYS = 5, 2, 5

# (warm-ups that do not count, replays) -> microseconds of a call, for each replay.
Replay = Callable[[int, int], list[float]]
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
