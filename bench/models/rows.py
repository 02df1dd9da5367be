"""Measures a phase of a model in each of its ways: who computes the right thing is timed."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.core.measure import Replay, allowed_error, relative_error, timings
from bench.core.results import Row, failure
from bench.models.decoding import Decoding, Prefill, Work
from bench.models.ideal import Rates, bytes_saved, flops_of, ideal_ms, weight_bytes_read
from bench.models.table import PLAIN
from bench.models.ways import Way, check_matrices
from fqcompile.fake_quantize import fake_quantize_
from fqcompile.kernels.tuning.search import WrongResult
from fqcompile.report import CompileReport, clear_reports, reports

Phase = Decoding | Prefill
WARM_CALLS = 3  # the first compiles, the second is recorded as a CUDA graph, the third replays it
_LOGITS = 256  # of the first sequence, kept for comparison with a start of the same way


@dataclass
class Ready:
    """A way that computes the right thing, compiled and warm, and what is known of it already."""

    work: Work
    row: Row


def measured_rows(
    model: nn.Module, phase: Phase, ways: Sequence[Way], layers: int, inner: str, rates: Rates
) -> Iterator[Row]:
    """A row for each way: its timing, or why there is none.

    A row with a timing has "logits", which are for `checked_logits` and no result.
    """
    ready: dict[str, Ready] = {}
    failures: dict[str, str] = {}
    torch.compiler.reset()
    for way in ways:
        try:
            ready[way.name] = _prepared(model, phase, way, layers, inner)
        except Exception as error:
            failures[way.name] = failure(error)
    device = next(model.parameters()).device
    found = timings({name: _replay(phase, known.work, device) for name, known in ready.items()})
    plain = found.get(PLAIN)
    for way in ways:
        row: Row = {"way": way.name, "library": way.label}
        if way.name in failures:
            yield row | {"failure": failures[way.name]}
            continue
        t, known = found[way.name], ready[way.name].row
        row |= {"ms": t.microseconds / 1e3, "low": t.low / 1e3, "high": t.high / 1e3}
        row["over_inductor"] = plain and plain.microseconds / t.microseconds
        ideal = ideal_ms(known["bytes_read"], flops_of(model, phase), rates)
        yield row | {"ideal_ms": ideal, "of_ideal": ideal / row["ms"]} | known


def first_logits(logits: Tensor) -> list[float]:
    """What is compared between processes, of logits [batch, vocabulary]."""
    found: list[float] = logits[0, :_LOGITS].double().tolist()
    return found


def _prepared(model: nn.Module, phase: Phase, way: Way, layers: int, inner: str) -> Ready:
    """Compile, compare with what must come out, and warm up."""
    clear_reports()
    skips = _cudagraph_skips()
    changed = model
    if way.change is not None:
        changed = copy.deepcopy(model)
        way.change(changed)
        check_matrices(changed, model)
    work = phase.step_of(changed, way.compiler(inner))
    phase.rewind()
    start = time.perf_counter()
    logits = work().clone()
    synchronize(logits.device)
    row: Row = {"first_call_s": time.perf_counter() - start}
    found = reports()
    error = relative_error(logits, _oracle_logits(changed, phase, found))
    row |= {"error": error, "allowed": allowed_error(logits.dtype, layers)}
    if not error <= row["allowed"]:
        raise WrongResult(f"relative error {error:.2g}, allowed {row['allowed']:.2g}")
    if way.options is not None:
        row |= about(found)
    held = weight_bytes_read(changed) - bytes_saved(found)
    row |= {"bytes_read": held + phase.context_bytes, "logits": first_logits(logits)}
    for _ in range(WARM_CALLS - 1):
        work()
    return Ready(work, row | {"cudagraph_skips": _cudagraph_skips() - skips})


def _cudagraph_skips() -> int:
    """How often Inductor, asked for CUDA graphs, went without."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def about(found: Sequence[CompileReport]) -> Row:
    """Of what finequant compiled: seconds of quantising, sizes, kernels."""
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


def _oracle_logits(model: nn.Module, phase: Phase, found: Sequence[CompileReport]) -> Tensor:
    """Eager, with every weight that was quantised here replaced by its dequantised value."""
    oracle = copy.deepcopy(model) if found else model
    for report in found:
        fake_quantize_(oracle, report)
    phase.rewind()
    return phase.step_of(oracle, lambda step: step)()


def _replay(phase: Phase, work: Work, device: torch.device) -> Replay:
    def replay(warm_ups: int, replays: int) -> list[float]:
        phase.rewind()
        for _ in range(warm_ups):
            work()
        return clocked(work, replays, device)

    return replay


def clocked(work: Callable[[], Tensor], count: int, device: torch.device) -> list[float]:
    """Microseconds of each of `count` calls: on a GPU from one's end to the next one's."""
    synchronize(device)
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


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
