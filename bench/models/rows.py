"""The ways that `bench models` runs a model, and a phase measured in each: who is right is timed.

inductor        16 bits, compiled by Inductor: what the others are held against
int8, int4      ours, adaptive granularity; the output head has 8 bits by default
int4 head       int4, the output head too
torchao int4    torchao's own quantization in groups of 128, head included, compiled by Inductor
llama.cpp       on a CPU: `models.llama_cpp`

All others are compiled with the same settings of Inductor.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.measure import Replay, allowed_error, relative_error, timed_if_right
from bench.core.results import Row, with_version
from bench.models import llama_cpp
from bench.models.phases import (
    Decoding,
    Generation,
    Phase,
    Rates,
    Ready,
    bytes_saved,
    experts_hit,
    flops_of,
    ideal_ms,
    random_tokens,
    weight_bytes_read,
)
from bench.models.section import LLAMA_CPP, PLAIN, over
from fqcompile.backend import finequant
from fqcompile.kernels.tuning.measure import WrongResult
from fqcompile.modules.fake_quantize import fake_quantize_
from fqcompile.report import CompileReport, clear_reports, reports

GROUP = 128
# Of a product with one matrix. A group of 128 normal numbers spans 5.6 standard deviations, in 15
# steps; rounding to them is 1/√12 of a step in the mean square, .108. Half as much again.
_ALLOWED_INT4 = 0.16
_TRIED_ROWS = 4
_LONG = 1e6  # microseconds: of a call that takes more, the warm-ups of a round are its replays
_TRIED_TOKENS = 16  # of which a model with experts decodes one
WARM_CALLS = 3  # the first compiles, the second is recorded as a CUDA graph, the third replays it


@dataclass(frozen=True)
class Way:
    """One of them.

    Attributes:
        options: finequant's; None where Inductor compiles the model.
        package: whose version the row names.
        change: quantizes the model in place, before it is compiled.
        own: runs a phase of the model by other means than PyTorch's.
    """

    name: str
    options: Mapping[str, Any] | None = None
    package: str = "torch"
    change: Callable[[nn.Module], None] | None = None
    own: Callable[[nn.Module, Phase], Ready] | None = None

    def compiler(self, inner: str, dynamic: bool | None) -> Callable[[Any], Any]:
        """torch.compile as users call it; `inner` other than Inductor has no CUDA graphs."""
        graphs = {"mode": "reduce-overhead"} if inner == "inductor" else {}
        if self.options is None:
            return partial(torch.compile, backend=inner, dynamic=dynamic, **graphs)
        options = {**self.options, "inner_backend": inner, **graphs}
        return partial(torch.compile, backend=finequant, dynamic=dynamic, options=options)


def _torchao_int4(model: nn.Module) -> None:
    """tinygemm's layout on a GPU; on a CPU the one that torchao 0.18 has for it.

    Neither sets Inductor's configuration, which all ways share.
    """
    if next(model.parameters()).device.type == "cuda":
        library = import_module("torchao.quantization")
        form = {"int4_packing_format": "tile_packed_to_4d"}
        config = library.Int4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False, **form)
    else:
        library = import_module("torchao.prototype.quantization.int4")
        config = library.PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    import_module("torchao.quantization").quantize_(model, config)


_ALL = (
    Way(PLAIN),
    Way("int8", {"bits": 8}, "fqcompile"),
    Way("int4", {"bits": 4}, "fqcompile"),
    Way("int4 head", {"bits": 4, "overrides": {"lm_head|embed_tokens": {"bits": 4}}}, "fqcompile"),
    Way("torchao int4", package="torchao", change=_torchao_int4),
    Way(LLAMA_CPP, package=llama_cpp.PACKAGE, own=llama_cpp.ready),
)
WAYS = {way.name: way for way in _ALL}


def runs_on(way: Way, device: torch.device) -> bool:
    """Whether it has kernels for the device; llama.cpp is built for a CPU alone."""
    return way.own is None or device.type == "cpu"


@torch.no_grad()
def check_matrices(changed: nn.Module, model: nn.Module) -> None:
    """Hold every linear layer of `changed` against that of `model`: to what 4 bits allow.

    Raises:
        WrongResult: one is further off.
    """
    originals = dict(model.named_modules())
    for name, module in changed.named_modules():
        if isinstance(module, nn.Linear):
            error = _product_error(module, originals[name])
            if not error <= _ALLOWED_INT4:
                raise WrongResult(f"{name}: relative error {error:.2g}, allowed {_ALLOWED_INT4}")


def _product_error(changed: nn.Linear, original: nn.Module) -> float:
    weight: Any = original.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (_TRIED_ROWS, weight.shape[1])
    x = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
    y: Tensor = F.linear(x, changed.weight).double()
    return relative_error(y, F.linear(x.double(), weight.double()))


def measured_rows(
    model: nn.Module, phase: Phase, ways: Sequence[Way], layers: int, inner: str, rates: Rates
) -> Iterator[Row]:
    """A row for each way: its timing, or why there is none."""
    ready: dict[str, Ready] = {}
    device = next(model.parameters()).device

    def prepare(way: Way) -> Replay:
        made = way.own(model, phase) if way.own else _prepared(model, phase, way, layers, inner)
        ready[way.name] = made
        return _replay(made, device)

    torch.compiler.reset()
    found, failures = timed_if_right({way.name: partial(prepare, way) for way in ways})
    milliseconds = {name: timing.microseconds / 1e3 for name, timing in found.items()}
    for way in ways:
        row: Row = {"way": way.name, "library": with_version(way.package)}
        if way.name in failures:
            yield row | {"failure": failures[way.name]}
            continue
        t, known = found[way.name], ready[way.name].row
        row |= {"ms": t.microseconds / 1e3, "low": t.low / 1e3, "high": t.high / 1e3}
        row |= over(row["ms"], milliseconds)
        if not isinstance(phase, Generation):
            ideal = ideal_ms(known["bytes_read"], flops_of(model, phase), rates)
            row |= {"ideal_ms": ideal, "of_ideal": ideal / row["ms"]}
        yield row | known


def _prepared(model: nn.Module, phase: Phase, way: Way, layers: int, inner: str) -> Ready:
    """Compile, compare with what must come out, and warm up."""
    clear_reports()
    skips = _cudagraph_skips()
    changed = model
    if way.change is not None:
        changed = copy.deepcopy(model)
        way.change(changed)
        check_matrices(changed, model)
    work = phase.step_of(changed, way.compiler(inner, phase.dynamic))
    phase.rewind()
    start = time.perf_counter()
    work()
    synchronize(next(model.parameters()).device)
    row: Row = {"first_call_s": time.perf_counter() - start}
    found = reports()
    oracle = _oracle(changed, found)
    if isinstance(phase, Decoding):
        settle(phase, oracle)
    phase.rewind()
    logits = work().clone()
    phase.rewind()
    error = relative_error(logits, phase.step_of(oracle, lambda step: step)())
    dtype = next(model.parameters()).dtype
    row |= {"error": error, "allowed": allowed_error(dtype, layers)}
    if not error <= row["allowed"]:
        raise WrongResult(f"relative error {error:.2g}, allowed {row['allowed']:.2g}")
    if way.options is not None:
        row |= about(found)
    if not isinstance(phase, Generation):
        hit = experts_hit(model, phase.rows)
        held = weight_bytes_read(changed, hit) - bytes_saved(found, hit)
        row["bytes_read"] = held + phase.context_bytes
    for _ in range(WARM_CALLS - 1):
        work()
    row["cudagraph_skips"] = _cudagraph_skips() - skips
    return Ready(work, phase.rewind, row)


def _cudagraph_skips() -> int:
    """How often Inductor, asked for CUDA graphs, went without."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def about(found: Sequence[CompileReport]) -> Row:
    """Of what finequant compiled: seconds of quantizing, sizes, kernels."""
    seconds = {p.name: p.seconds for report in found for p in report.passes}
    totals = [report.plan.totals for report in found]
    return {
        "quantize_s": seconds.get("plan", 0.0),
        "linear_bytes": sum(t.bytes_after for t in totals),
        "linear_bytes_before": sum(t.bytes_before for t in totals),
        "kernels": sorted({line for report in found for line in _kernels(report)}),
    }


def _kernels(report: CompileReport) -> Iterator[str]:
    """What `select` chose, without the names of the layers."""
    for record in report.passes:
        if record.name == "select":
            yield from (line.partition(": ")[2] for line in record.matched)


def settle(phase: Decoding, oracle: nn.Module) -> None:
    """Decode the token whose experts the oracle chooses by the widest margin, of a few tried.

    Where two experts score alike, rounding decides which one is asked, and right ways to run a
    model differ by a whole expert.
    """
    chosen = getattr(oracle.config, "num_experts_per_tok", None)
    if chosen is None:
        return
    margins: list[float] = []

    def run(**inputs: Any) -> Any:
        output = oracle(**inputs, output_router_logits=True)
        best = [scores.float().topk(chosen + 1).values for scores in output.router_logits]
        margins.append(min(float((scores[:, -2] - scores[:, -1]).min()) for scores in best))
        return output

    step = phase.step_of(run, lambda step: step)
    random = random_tokens(oracle, _TRIED_TOKENS, len(phase.tokens))
    tried = [tokens.contiguous() for tokens in random.split(1, dim=1)]
    for tokens in tried:
        phase.tokens = tokens
        phase.rewind()
        step()
    phase.tokens = tried[margins.index(max(margins))]


def _oracle(model: nn.Module, found: Sequence[CompileReport]) -> nn.Module:
    """To run eagerly: every weight that was quantized here has its dequantized value."""
    oracle = copy.deepcopy(model) if found else model
    for report in found:
        fake_quantize_(oracle, report)
    return oracle


def _replay(ready: Ready, device: torch.device) -> Replay:
    def replay(warm_ups: int, replays: int) -> list[float]:
        ready.rewind()
        times = clocked(ready.work, warm_ups, device)
        return times if max(times, default=0) > _LONG else clocked(ready.work, replays, device)

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
