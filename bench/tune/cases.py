"""Measures one case of `bench tune`: a GPU's by the autotuner itself, a CPU's kernel by kernel.

Nothing is timed before its result was compared with fp64, in the same run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from bench.core.measure import Record, Replay, timed_if_right, timings
from bench.core.results import failure
from fqcompile.kernels.registry import TEMPLATES, select_kernel
from fqcompile.kernels.roofline import least_seconds
from fqcompile.kernels.spec import Config, GemmSpec, parse_config
from fqcompile.kernels.template import SearchMode, Template, nothing_to_search
from fqcompile.kernels.tuning.key import Bucket
from fqcompile.kernels.tuning.measure import difference, prepared
from fqcompile.kernels.tuning.search import MakeMeasure, WrongResult, search
from fqcompile.kernels.tuning.table import Timing, TunedTable
from fqcompile.report.tuning_case import Candidate, TuningCase, searched_case

CPU = torch.device("cpu")


def searched_on_gpu(
    spec: GemmSpec,
    bucket: Bucket,
    mode: SearchMode,
    make_measure: MakeMeasure,
    table: TunedTable,
    record: Record,
    device: torch.device,
) -> TuningCase:
    """What the search finds with an empty `table`; then the best and the closed form once more, in
    turn, since the best of many noisy times is luckier than it will be."""
    template = select_kernel(spec).template
    found = search(template, spec, bucket, mode, make_measure, table)
    case = searched_case(spec, template, bucket, *found)
    rivals = [name for name in (case.best, case.choice) if name in case.timed]
    if len(set(rivals)) < 2:
        return case
    try:
        return replace(case, final=_final(case, template, rivals, record, device))
    except Exception as error:
        return replace(case, problem=f"not measured a second time: {failure(error)}")


def _final(
    case: TuningCase, template: Template, names: Sequence[str], record: Record, device: torch.device
) -> dict[str, Timing]:
    runs, expected = prepared(template, case.spec, case.spec.m, device)
    replays = {
        name: _checked(runs, expected, parse_config(name), case.spec, record) for name in names
    }
    return timings(replays)


def compared_on_cpu(
    spec: GemmSpec, record: Record, templates: Sequence[Template] | None = None
) -> TuningCase:
    """All kernels that have no configuration, in turn, at `spec.m` rows.

    `templates`: instead of those that are registered.
    """
    tried = _without_configurations() if templates is None else templates
    refusals = {t.name: reason for t in tried if (reason := t.refuse(spec)) is not None}
    ready = {t.name: partial(_recorded, t, spec, record) for t in tried if t.name not in refusals}
    found, wrong = timed_if_right(ready)
    refusals |= wrong
    ideal = least_seconds(spec)
    assert ideal is not None, "a CPU's read rate can be measured"
    selected = select_kernel(spec).template.name
    return TuningCase(
        spec=spec,
        kernel=selected,
        rows=f"M = {spec.m}",
        ideal_us=1e6 * ideal,
        choice=selected,
        candidates=tuple(Candidate(t.name, found.get(t.name), refusals.get(t.name)) for t in tried),
    )


def _without_configurations() -> list[Template]:
    return [t for t in TEMPLATES.values() if t.candidates is nothing_to_search]


def _recorded(template: Template, spec: GemmSpec, record: Record) -> Replay:
    return _checked(*prepared(template, spec, spec.m, CPU), None, spec, record)


def _checked(
    runs: Sequence[Callable[[Config | None], torch.Tensor]],
    expected: torch.Tensor,
    config: Config | None,
    spec: GemmSpec,
    record: Record,
) -> Replay:
    """Ready to be timed.

    Raises:
        WrongResult: it computes something else.
    """
    wrong = difference(runs[0](config), expected, spec.k)
    if wrong is not None:
        raise WrongResult(wrong)
    return record([partial(run, config) for run in runs])
