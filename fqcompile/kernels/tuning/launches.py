"""Choose a kernel's configuration: from a tuned table, a search, or the heuristic.

A search measures each candidate once, stores each result immediately, and survives failures.
Candidates that were tried before are skipped, so a killed search resumes where it stopped.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final, Literal, NamedTuple

import torch

from fqcompile.distributed.ranks import progress
from fqcompile.kernels.spec import Config, GemmSpec, LaunchTable, Step
from fqcompile.kernels.template import SearchMode, Template
from fqcompile.kernels.tuning.key import Bucket, Ends, bucket_name, bucket_of, rows_of, tuning_key
from fqcompile.kernels.tuning.measure import DeviceLost, Measure, WrongResult, measure_on_gpu
from fqcompile.kernels.tuning.table import Case, Trial, TunedTable, table_for

Source = Literal["heuristic", "tuned table", "searched"]
CLOSED_FORM: Final = "heuristic"
TABLE: Final = "tuned table"
SEARCHED: Final = "searched"
_FROM_GUESS_TO_KNOWLEDGE: tuple[Source, ...] = (CLOSED_FORM, TABLE, SEARCHED)
Mode = Literal["off"] | SearchMode
MakeMeasure = Callable[[Template, GemmSpec, int], Measure]
_LONGEST_REFUSAL = 200
log = logging.getLogger("fqcompile")


class Chosen(NamedTuple):
    """The launches of one kernel, the best source among its steps, and what the report should say.

    `launches` is None if the kernel has nothing to configure.
    """

    launches: LaunchTable | None
    source: Source
    notes: tuple[str, ...] = ()


def tuned_launches(
    spec: GemmSpec,
    template: Template,
    mode: Mode,
    make_measure: MakeMeasure = measure_on_gpu,
    table: TunedTable | None = None,
) -> Chosen:
    """The heuristic's launches with each configuration replaced by the fastest one measured.

    "off" uses the table only; "fast" searches if the table has no entry; "max" if it has no entry
    of a full search. The bounds of M are the heuristic's, which knows at which M another kind of
    kernel becomes faster. A step is measured at its first and its last number of rows, and gets
    what loses least to the fastest of both, as by the heuristic.
    """
    closed = template.launches(spec)
    if closed is None or spec.gpu is None:
        return Chosen(closed, CLOSED_FORM)
    table = table or table_for(spec.gpu)
    steps: list[Step] = []
    sources: list[Source] = []
    notes: list[str] = []
    for bound, ends, config in steps_in_range(spec, closed):
        tuned, source, problems = _tuned(spec, template, ends, mode, make_measure, table)
        sources.append(source)
        notes += problems
        if steps and steps[-1][1] == (tuned or config):
            steps.pop()
        steps.append((bound, tuned or config))
    source = max(sources, key=_FROM_GUESS_TO_KNOWLEDGE.index)
    return Chosen(LaunchTable(tuple(steps)), source, tuple(notes))


def steps_in_range(spec: GemmSpec, closed: LaunchTable) -> list[tuple[int | None, Ends, Config]]:
    """The steps that `spec`'s rows can reach: (bound, where it is measured, configuration).

    The last one has no bound, as a LaunchTable requires, but ends at the largest possible M. One
    without end is measured as the open bucket, and a fixed M in its own.
    """
    low, high = spec.m_range or (spec.m, spec.m)
    reached: list[tuple[int | None, Ends, Config]] = []
    first = low
    for bound, config in closed.steps:
        if bound is not None and bound < low:
            continue
        if bound is None or (high is not None and bound >= high):
            if high is None:
                ends: Ends = (None,)
            elif spec.m_range is None:
                ends = (bucket_of(high, spec),)
            else:
                ends = _ends(first, high)
            reached.append((None, ends, config))
            break
        reached.append((bound, _ends(first, bound), config))
        first = bound + 1
    return reached


def _ends(first: int, last: int) -> Ends:
    return tuple(dict.fromkeys((max(1, first), max(1, last))))


def ends_in_a_model(spec: GemmSpec, template: Template) -> list[Ends]:
    """What a model with a dynamic batch size looks up: one row, then each step."""
    spec = replace(spec, m_range=(1, None))
    closed = template.launches(spec)
    if closed is None:
        return []
    steps = steps_in_range(spec, closed)
    return list(dict.fromkeys([(bucket_of(1, spec),), *(ends for _, ends, _ in steps)]))


def _tuned(
    spec: GemmSpec,
    template: Template,
    ends: Ends,
    mode: Mode,
    make_measure: MakeMeasure,
    table: TunedTable,
) -> tuple[Config | None, Source, list[str]]:
    """The configuration of `ends` by what was measured or None, its source, and what went wrong."""
    key = tuning_key(spec, template.layout.name)
    source: Source = TABLE
    cases, problems = [], []
    for bucket in ends:
        case, problem = table.case(key, bucket), None
        if mode != "off" and _untried(case, _candidates(template, spec, ends, mode)):
            case, problem = search(template, spec, bucket, mode, make_measure, table, ends)
            source = SEARCHED
        problem = problem or case.failure
        problems += [f"{bucket_name(bucket, spec)}: {problem}"] if problem else []
        cases.append(case)
    best = None
    if any(case.best for case in cases):
        modes: tuple[SearchMode, ...] = ("fast", "max")
        offered = {config for mode in modes for config in _candidates(template, spec, ends, mode)}
        best = _least_loss(cases, offered)  # of others the file has times if it was edited
    return best, source if best else CLOSED_FORM, problems


def _candidates(
    template: Template, spec: GemmSpec, ends: Ends, mode: SearchMode
) -> Sequence[Config]:
    at = at_bucket(spec, ends[-1])
    return template.candidates(at, at.m, mode, at_bucket(spec, ends[0]).m)


def _untried(case: Case, candidates: Sequence[Config]) -> list[Config]:
    tried = {trial.config for trial in case.trials}
    return [config for config in candidates if config not in tried]


def _least_loss(cases: Sequence[Case], offered: Collection[Config]) -> Config | None:
    """Of what was timed in each case, the one that loses least to the fastest of each.

    A case with no times does not count. Of equals, it is the one tried first.
    """
    timed = [
        {t.config: t.timing.microseconds for t in case.trials if t.timing and t.config in offered}
        for case in cases
    ]
    fastest = [(times, min(times.values())) for times in timed if times]
    if not fastest:
        return None
    in_all = (config for config in fastest[-1][0] if all(config in times for times, _ in fastest))
    return min(in_all, key=lambda c: max(times[c] / best for times, best in fastest), default=None)


class Searched(NamedTuple):
    """The results of a search, and why it is incomplete, or None."""

    case: Case
    problem: str | None


def at_bucket(spec: GemmSpec, bucket: Bucket) -> GemmSpec:
    """The matmul with the number of rows that the bucket is measured at."""
    return replace(spec, m=rows_of(bucket, spec), m_range=None)


def search(
    template: Template,
    spec: GemmSpec,
    bucket: Bucket,
    mode: SearchMode,
    make_measure: MakeMeasure,
    table: TunedTable,
    ends: Ends = (),
) -> Searched:
    """Try the template's candidates for one bucket of M, except those already in `table`.

    With `ends`, of which the bucket is one, they are the candidates for all rows between these.
    `make_measure(template, spec, m)` sets up what the trials share. An `Exception` raised by a
    trial is recorded as its result; others, such as KeyboardInterrupt, propagate, and only the
    trial in progress is lost.
    """
    ends = ends or (bucket,)
    candidates = _candidates(template, spec, ends, mode)
    key, spec = tuning_key(spec, template.layout.name), at_bucket(spec, bucket)
    with table.search_alone():
        left = _untried(table.case(key, bucket), candidates)
        problem = _try_all(left, template, spec, make_measure, lambda t: table.add(key, bucket, t))
    if problem is None:
        if ends == (bucket,) and not table.case(key, bucket).has(mode):
            table.finish(key, bucket, mode)
        problem = table.case(key, bucket).failure
    if problem is not None:
        log.warning("tuning %s, M = %d: %s", key, spec.m, problem)
    return Searched(table.case(key, bucket), problem)


def _try_all(
    configs: list[Config],
    template: Template,
    spec: GemmSpec,
    make_measure: MakeMeasure,
    keep: Callable[[Trial], None],
) -> str | None:
    """Measure `configs`; return why some have no result, or None if all have one."""
    if not configs:
        return None
    try:
        measure = make_measure(template, spec, spec.m)
    except Exception as error:
        return f"nothing could be measured: {_first_line(error)}"
    stack = f"{spec.experts}x" if spec.experts else ""
    shape = f"tuning {stack}{spec.n}x{spec.k} {spec.qtype.name} M={spec.m}"
    problem = None
    for config in progress(configs, shape, leave=False):
        try:
            trial = Trial(config, measure(config))
        except torch.OutOfMemoryError as error:
            # Depends on what else uses the GPU, so it is no result of this configuration.
            problem = f"{config} could not be measured: {_first_line(error)}"
            continue
        except DeviceLost as error:
            keep(Trial(config, refusal=_first_line(error)))
            return f"stopped after {config}: {_first_line(error)}"
        except Exception as error:
            trial = Trial(config, refusal=_first_line(error))
        keep(trial)
    return problem


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, WrongResult):
        return f"wrong result: {lines[0]}"[:_LONGEST_REFUSAL]
    return f"{type(error).__name__}: {lines[0]}"[:_LONGEST_REFUSAL]
