"""Measures a phase of a model: 16 bits by Inductor, int8 and int4 by finequant.

"int4 head": the output head in 4 bits too, which by default has 8.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from bench.decoding import Decoding, Prefill, Work
from bench.failures import failure
from bench.interleaved import Replay, timings
from bench.results import Row
from fqcompile.backend import finequant
from fqcompile.fake_quantize import fake_quantize_
from fqcompile.kernels.tuning.search import WrongResult
from fqcompile.report import CompileReport, clear_reports, reports

Phase = Decoding | Prefill
PLAIN = "inductor"
WAYS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 head": {"bits": 4, "overrides": {"lm_head|embed_tokens": {"bits": 4}}},
}
# Results that are rounded one after another in a layer: norm, q/k/v, scores, softmax, values, out,
# sum, norm, up, activation, down, sum.
CHAIN = 12
_WARM_CALLS = 3  # the first compiles, the second is recorded as a CUDA graph, the third replays it


@dataclass
class Ready:
    """A way that computes the right thing, compiled and warm, and what is known of it already."""

    work: Work
    row: Row


def compiler(own: dict[str, Any] | None, inner: str) -> Callable[[Any], Any]:
    """torch.compile as users call it; `inner` other than Inductor has no CUDA graphs."""
    graphs = {"mode": "reduce-overhead"} if inner == "inductor" else {}
    if own is None:
        return partial(torch.compile, backend=inner, dynamic=False, **graphs)
    options = {**own, "inner_backend": inner, **graphs}
    return partial(torch.compile, backend=finequant, dynamic=False, options=options)


def allowed_error(dtype: torch.dtype, layers: int) -> float:
    """The largest ‖y - ŷ‖ / ‖ŷ‖ between two right ways to run a model.

    Each result of CHAIN * layers is rounded, twice at most, to half an ulp u: u/√3 in the mean
    square, independently, in both: √(4 * CHAIN * layers / 3) u. Twice that.
    """
    return 2 * sqrt(4 * CHAIN * layers / 3) * torch.finfo(dtype).eps / 2


def measured_rows(model: nn.Module, phase: Phase, layers: int, inner: str) -> Iterator[Row]:
    """A row for each way: its timing, or why there is none."""
    ready: dict[str, Ready] = {}
    failures: dict[str, str] = {}
    torch.compiler.reset()
    for way, options in WAYS.items():
        try:
            ready[way] = _prepared(model, phase, options, layers, inner)
        except Exception as error:
            failures[way] = failure(error)
    device = next(model.parameters()).device
    found = timings({way: _replay(phase, known.work, device) for way, known in ready.items()})
    plain = found.get(PLAIN)
    for way in WAYS:
        row: Row = {"way": way}
        if way in failures:
            yield row | {"failure": failures[way]}
            continue
        t = found[way]
        row |= {"ms": t.microseconds / 1e3, "low": t.low / 1e3, "high": t.high / 1e3}
        row["over_inductor"] = plain and plain.microseconds / t.microseconds
        yield row | ready[way].row


def _prepared(
    model: nn.Module, phase: Phase, options: dict[str, Any] | None, layers: int, inner: str
) -> Ready:
    """Compile, compare with the dequantised weights in the same model, and warm up."""
    clear_reports()
    skips = _cudagraph_skips()
    work = phase.step_of(model, compiler(options, inner))
    phase.rewind()
    start = time.perf_counter()
    logits = work().clone()
    _synchronize(logits.device)
    row: Row = {"first_call_s": time.perf_counter() - start}
    found = reports()
    if options is not None:
        error = _relative_error(logits, _oracle_logits(model, phase, found))
        row |= _about(found) | {"error": error, "allowed": allowed_error(logits.dtype, layers)}
        if not error <= row["allowed"]:
            raise WrongResult(f"relative error {error:.2g}, allowed {row['allowed']:.2g}")
    for _ in range(_WARM_CALLS - 1):
        work()
    return Ready(work, row | {"cudagraph_skips": _cudagraph_skips() - skips})


def _cudagraph_skips() -> int:
    """How often Inductor, asked for CUDA graphs, went without."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def _about(found: list[CompileReport]) -> Row:
    seconds = {p.name: p.seconds for report in found for p in report.passes}
    totals = [report.plan.totals for report in found]
    return {
        "quantize_s": sum(seconds.get(name, 0.0) for name in ("choose", "quantize")),
        "linear_bytes": sum(t.bytes_after for t in totals),
        "linear_bytes_before": sum(t.bytes_before for t in totals),
        "kernels": sorted({line for report in found for line in _kernels(report)}),
    }


def _kernels(report: CompileReport) -> Iterator[str]:
    """What `select` chose, without the names of the layers."""
    for record in report.passes:
        if record.name == "select":
            yield from (line.partition(": ")[2] for line in record.matched)


def _oracle_logits(model: nn.Module, phase: Phase, found: list[CompileReport]) -> Tensor:
    """Eager, with every weight that was quantised replaced by its dequantised value."""
    oracle = copy.deepcopy(model)
    for report in found:
        fake_quantize_(oracle, report)
    phase.rewind()
    return phase.step_of(oracle, lambda step: step)()


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _replay(phase: Phase, work: Work, device: torch.device) -> Replay:
    def replay(warm_ups: int, replays: int) -> list[float]:
        phase.rewind()
        for _ in range(warm_ups):
            work()
        return clocked(work, replays, device)

    return replay


def clocked(work: Work, count: int, device: torch.device) -> list[float]:
    """Microseconds of each of `count` calls: on a GPU from one's end to the next one's."""
    _synchronize(device)
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            work()
            marks.append(time.perf_counter())
        return [1e6 * (end - start) for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairwise(events)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
