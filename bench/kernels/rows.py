"""Measures one layer at one M: who computes the right thing is timed, the others say why not."""

from collections.abc import Iterator, Sequence
from functools import partial

from bench.core.measure import Record, Replay, timings
from bench.core.results import Row, failure
from bench.core.shapes import OURS, Shape
from bench.kernels.baselines import BASELINES, CUBLAS, Baseline
from bench.kernels.contenders import Contender, Ours, Problem, wrong_result
from fqcompile.kernels.roofline import ideal_seconds
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.launches import Mode
from fqcompile.kernels.tuning.search import WrongResult
from fqcompile.kernels.tuning.table import Timing


class Layer:
    """A shape with every contender set up, for all of its M; `failures` of those that could not."""

    def __init__(self, problem: Problem, baselines: Sequence[str]) -> None:
        self.problem = problem
        self.failures: dict[str, str] = {}
        self.others: list[Contender] = []
        self.ours: Ours | None = None
        try:
            self.ours = Ours(problem)
        except Exception as error:
            self.failures[OURS] = failure(error)
        for name in baselines:
            self._add(BASELINES[name])

    def _add(self, baseline: Baseline) -> None:
        absent = baseline.absent(self.problem.spec)
        if absent is not None:
            self.failures[baseline.name] = absent
            return
        try:
            self.others.append(baseline.prepare(baseline, self.problem))
        except Exception as error:
            self.failures[baseline.name] = failure(error)


def measured_rows(layer: Layer, spec: GemmSpec, tune: Mode, record: Record) -> Iterator[Row]:
    """A row for each contender: its timing, or why there is none. `spec.m` is the M.

    The ideal is that of the layer as quantised, for baselines too.
    """
    failures = dict(layer.failures)
    contenders = list(layer.others)
    if layer.ours is not None:
        try:
            contenders = [*layer.ours.contenders(spec, tune), *contenders]
        except Exception as error:
            failures[OURS] = failure(error)
    replays = _recorded(layer.problem, contenders, spec, record, failures)
    found = timings(replays)
    ideal = 1e6 * ideal_seconds(spec, spec.m)
    for contender in contenders:
        if timing := found.get(contender.name):
            row = {"contender": contender.name, "detail": contender.detail, "ideal_us": ideal}
            yield row | _figures(timing, ideal, found.get(CUBLAS))
    for name, text in failures.items():
        yield {"contender": name, "ideal_us": ideal, "failure": text}


def _recorded(
    problem: Problem,
    contenders: Sequence[Contender],
    spec: GemmSpec,
    record: Record,
    failures: dict[str, str],
) -> dict[str, Replay]:
    """Those with a right result, ready to be timed; the others are added to `failures`."""
    x, expected = problem.x(spec.m), problem.expected(spec.m)
    replays = {}
    for contender in contenders:
        try:
            wrong = wrong_result(contender.run(x, contender.weights[0]), expected, contender, spec)
            if wrong is not None:
                raise WrongResult(wrong)
            calls = [partial(contender.run, x, weight) for weight in contender.weights]
            replays[contender.name] = record(calls)
        except Exception as error:
            failures[contender.name] = failure(error)
    return replays


def _figures(timing: Timing, ideal: float, cublas: Timing | None) -> Row:
    return {
        "us": timing.microseconds,
        "low": timing.low,
        "high": timing.high,
        "of_ideal": ideal / timing.microseconds,
        "over_cublas": cublas and cublas.microseconds / timing.microseconds,
    }


def identified(row: Row, shape: Shape, spec: GemmSpec) -> Row:
    """The row with the layer that it is of."""
    group = "column" if spec.group_size >= spec.k else spec.group_size
    dtype = str(spec.dtype).removeprefix("torch.")
    about = {"shapes": shape.source, "n": spec.n, "k": spec.k, "m": spec.m}
    return {**about, "bits": spec.bits, "group": group, "dtype": dtype, **row}
