"""The code of `fqcompile demo`: compile two real models, measure them and check the results.

Part of the package, so that the demo is available wherever fqcompile is installed. This file has
what both halves share: timings of alternatives that stay fair on a noisy machine, because rounds
are interleaved and reported as medians with their spread.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one alternative over the rounds: 20th, 50th and 80th percentile."""

    p20_ms: float
    median_ms: float
    p80_ms: float

    def __str__(self) -> str:
        return f"{self.median_ms:.1f} [{self.p20_ms:.1f}, {self.p80_ms:.1f}]"


def time_interleaved(
    alternatives: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Timing]:
    """Time each alternative once per round, after a warm-up round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for round_number in range(rounds + 1):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    points = seconds * 2 if len(seconds) == 1 else seconds  # one round has no spread
    deciles = [1e3 * q for q in quantiles(points, n=10, method="inclusive")]
    return Timing(deciles[1], deciles[4], deciles[7])


def tell(text: str, end: str = "\n") -> None:
    """Print without buffering, also to a pipe, so that progress is visible at once."""
    print(text, end=end, flush=True)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Print the current step, and then its duration, on one line."""
    tell(f"  {what} ... ", end="")
    start = time.perf_counter()
    yield
    tell(f"{time.perf_counter() - start:.1f} s")
