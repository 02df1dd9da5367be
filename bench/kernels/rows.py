"""Measures one layer at one M: who computes the right thing is timed, the others say why not."""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from bench.core.measure import Record, Replay, microseconds, timed_if_right
from bench.core.results import Row, failure
from bench.core.shapes import OURS, Shape
from bench.kernels.baselines import BASELINES, CUBLAS, Baseline
from bench.kernels.contenders import Contender, Ours, Problem, wrong_result
from fqcompile.kernels.roofline import ideal_seconds
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.launches import Mode
from fqcompile.kernels.tuning.measure import WrongResult


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

    The ideal is that of the layer as quantized, for baselines too.
    """
    failures = dict(layer.failures)
    contenders = list(layer.others)
    if layer.ours is not None:
        try:
            contenders = [*layer.ours.contenders(spec, tune), *contenders]
        except Exception as error:
            failures[OURS] = failure(error)
    x, expected = layer.problem.x(spec.m), layer.problem.expected(spec.m)
    given = (x, expected, spec, record)
    found, wrong = timed_if_right({c.name: partial(_recorded, c, *given) for c in contenders})
    ideal, cublas = 1e6 * ideal_seconds(spec, spec.m), found.get(CUBLAS)
    for contender in contenders:
        if timing := found.get(contender.name):
            row = {"contender": contender.name, "detail": contender.detail, "ideal_us": ideal}
            over = cublas and cublas.microseconds / timing.microseconds
            shares = {"of_ideal": ideal / timing.microseconds, "over_cublas": over}
            yield row | microseconds(timing) | shares
    for name, text in (failures | wrong).items():
        yield {"contender": name, "ideal_us": ideal, "failure": text}


def _recorded(
    contender: Contender, x: Tensor, expected: Tensor, spec: GemmSpec, record: Record
) -> Replay:
    """Ready to be timed.

    Raises:
        WrongResult: it computes something else.
    """
    wrong = wrong_result(contender.run(x, contender.weights[0]), expected, contender, spec)
    if wrong is not None:
        raise WrongResult(wrong)
    return record([partial(contender.run, x, weight) for weight in contender.weights])


def identified(row: Row, shape: Shape, spec: GemmSpec) -> Row:
    """The row with the layer that it is of."""
    group = "column" if spec.group_size >= spec.k else spec.group_size
    dtype = str(spec.dtype).removeprefix("torch.")
    about = {"shapes": shape.source, "n": spec.n, "k": spec.k, "m": spec.m}
    return {**about, "bits": spec.bits, "group": group, "dtype": dtype, **row}
