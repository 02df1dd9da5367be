"""The search: measure each candidate once, store each result immediately, survive failures.

Candidates that were tried before are skipped, so a killed search resumes where it stopped.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from fqcompile.distributed.ranks import progress
from fqcompile.errors import FineQuantError
from fqcompile.kernels.spec import Config, GemmSpec
from fqcompile.kernels.template import SearchMode, Template
from fqcompile.kernels.tuning.key import Bucket, rows_of, tuning_key
from fqcompile.kernels.tuning.table import Case, Timing, Trial, TunedTable

log = logging.getLogger("fqcompile")

Measure = Callable[[Config], Timing]
MakeMeasure = Callable[[Template, GemmSpec, int], Measure]
_LONGEST_REFUSAL = 200


class WrongResult(FineQuantError):
    """A configuration's result differs from the reference; the message says by how much."""


class DeviceLost(FineQuantError):
    """A configuration destroyed the process's CUDA context: nothing more can be measured."""


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
) -> Searched:
    """Try the template's candidates for one bucket of M, those that `table` knows left out.

    `make_measure(template, spec, m)` sets up what the trials share. An exception of a trial is
    its result; KeyboardInterrupt and the like pass through, and lose the trial at work.
    """
    key, spec = tuning_key(spec, template.layout.name), at_bucket(spec, bucket)
    candidates = template.candidates(spec, spec.m, mode)
    with table.search_alone():
        known = table.case(key, bucket)
        left = [config for config in candidates if known.trial(config) is None]
        problem = _try_all(left, template, spec, make_measure, lambda t: table.add(key, bucket, t))
    if problem is None:
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
    """Why some of `configs` have no result; None where all have one."""
    if not configs:
        return None
    try:
        measure = make_measure(template, spec, spec.m)
    except Exception as error:
        return f"nothing could be measured: {_first_line(error)}"
    stack = f"{spec.experts}x" if spec.experts else ""
    shape = f"tuning {stack}{spec.n}x{spec.k} int{spec.bits} M={spec.m}"
    problem = None
    for config in progress(configs, shape, leave=False):
        try:
            trial = Trial(config, measure(config))
        except torch.OutOfMemoryError as error:
            # Says less about the configuration than about other users of the GPU.
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
