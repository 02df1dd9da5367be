"""Choose a kernel's configuration: from a tuned table, a search, or the heuristic."""

from dataclasses import replace
from typing import Final, Literal, NamedTuple

from fqcompile.kernels.spec import Config, GemmSpec, LaunchTable, Step
from fqcompile.kernels.template import SearchMode, Template
from fqcompile.kernels.tuning.key import Bucket, bucket_name, bucket_of, tuning_key
from fqcompile.kernels.tuning.measure import measure_on_gpu
from fqcompile.kernels.tuning.search import MakeMeasure, at_bucket, search
from fqcompile.kernels.tuning.table import Case, TunedTable, table_for

Source = Literal["heuristic", "tuned table", "searched"]
CLOSED_FORM: Final = "heuristic"
TABLE: Final = "tuned table"
SEARCHED: Final = "searched"
_FROM_GUESS_TO_KNOWLEDGE: tuple[Source, ...] = (CLOSED_FORM, TABLE, SEARCHED)
Mode = Literal["off"] | SearchMode
MAX_KERNELS = 4  # no more are compiled for one node; dense layers have three


class Chosen(NamedTuple):
    """The launches of one kernel, the best source among its steps, and what the report should say.

    `launches` is None where the kernel has nothing to configure.
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
    of a full search. The bounds of M are the heuristic's, which knows where the kind of kernel
    changes. A step is measured at its largest number of rows, which takes the longest.
    """
    closed = template.launches(spec)
    if closed is None or spec.gpu is None:
        return Chosen(closed, CLOSED_FORM)
    table = table or table_for(spec.gpu)
    steps: list[Step] = []
    sources: list[Source] = []
    notes: list[str] = []
    for bound, bucket, config in steps_in_range(spec, closed):
        tuned, source, problem = _tuned(spec, template, bucket, mode, make_measure, table)
        sources.append(source)
        if problem is not None:
            notes.append(f"{bucket_name(bucket, spec)}: {problem}")
        if steps and steps[-1][1] == (tuned or config):
            steps.pop()
        steps.append((bound, tuned or config))
    source = max(sources, key=_FROM_GUESS_TO_KNOWLEDGE.index)
    return Chosen(LaunchTable(tuple(steps)), source, tuple(notes))


def steps_in_range(spec: GemmSpec, closed: LaunchTable) -> list[tuple[int | None, Bucket, Config]]:
    """The steps that `spec`'s rows can reach, at most four: (bound, bucket of it, configuration).

    The last is open, as a LaunchTable wants it, but its bucket is that of the largest M there is.
    """
    low, high = spec.m_range or (spec.m, spec.m)
    reached: list[tuple[int | None, Bucket, Config]] = []
    for bound, config in closed.steps:
        if bound is not None and bound < low:
            continue
        if bound is None or (high is not None and bound >= high):
            reached.append((None, None if high is None else bucket_of(high, spec), config))
            break
        reached.append((bound, bucket_of(bound, spec), config))
    return [*reached[:-1][: MAX_KERNELS - 1], reached[-1]]


def buckets_of_a_model(spec: GemmSpec, template: Template) -> list[Bucket]:
    """The buckets that a model with an open batch looks up, after that of a single row."""
    closed = template.launches(replace(spec, m_range=(1, None)))
    if closed is None:
        return []
    found = [bucket for _, bucket, _ in steps_in_range(replace(spec, m_range=(1, None)), closed)]
    return list(dict.fromkeys([bucket_of(1, spec), *found]))


def _tuned(
    spec: GemmSpec,
    template: Template,
    bucket: Bucket,
    mode: Mode,
    make_measure: MakeMeasure,
    table: TunedTable,
) -> tuple[Config | None, Source, str | None]:
    """The measured configuration of one bucket, or None with what went wrong, if anything did."""
    key = tuning_key(spec, template.layout.name)
    source: Source = TABLE
    case, problem = table.case(key, bucket), None
    if mode != "off" and not case.has(mode):
        case, problem = search(template, spec, bucket, mode, make_measure, table)
        source = SEARCHED
    best = _offered(case, template, at_bucket(spec, bucket)).best
    return (best.config, source, problem) if best else (None, CLOSED_FORM, problem or case.failure)


def _offered(case: Case, template: Template, spec: GemmSpec) -> Case:
    """Drop configurations that the template does not offer: the file may have been edited."""
    modes: tuple[SearchMode, ...] = ("fast", "max")
    offered = {config for mode in modes for config in template.candidates(spec, spec.m, mode)}
    return replace(case, trials=tuple(t for t in case.trials if t.config in offered))
