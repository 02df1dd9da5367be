"""Our x86 kernel against PyTorch's and onnxruntime's, layer by layer, on a CPU.

    python -m bench kernels --device cpu [--shapes llama-3-8b 4096x4096] [--m 1,16,256] [--bits 4]
        [--group 128|column] [--threads 1,2] [--json FILE] [--time-budget SECONDS]

Results are compared with fp64 before anything is timed. Then all ways run in turn, in one process,
each call on another copy of the weight, so that none finds it in a cache; of the calls of all
rounds the median, 20th and 80th percentile and the least, in microseconds. "read rate" is the
packed weight's bytes over the median of ours in bf16, of the rate at which this machine, with as
many threads, reads a large tensor.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from bench.core.results import Results, Row, Step, failure
from bench.core.section import failures, show
from bench.core.shapes import Shape, parse_shapes
from bench.kernels.cpu_ways import Way, ways
from bench.kernels.section import cpu_kernels
from fqcompile.kernels.roofline import read_bandwidth, weight_bytes
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.measure import random_problem, reference

BF16 = torch.bfloat16
ROUNDS, LEAST_SECONDS, MOST_CALLS = 7, 0.03, 12
_MOST_SECONDS = 1.5  # a call; PyTorch's int4 kernel takes 20 for 256 rows of fp32
# Rounding of x and y to bf16; int8 activations add half a step of 1/127 of a row's largest.
_ALLOWED, _ALLOWED_LOOSE = 2.0**-7, 0.03

Calls = Sequence[Callable[[], object]]


def interleaved(alternatives: Mapping[str, Calls]) -> dict[str, list[float]]:
    """Microseconds of single calls; round by round all alternatives in turn."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(ROUNDS):
        for name, calls in alternatives.items():
            calls[-1]()
            began = time.perf_counter()
            for i in range(MOST_CALLS):
                start = time.perf_counter()
                calls[i % len(calls)]()
                end = time.perf_counter()
                times[name].append(1e6 * (end - start))
                if end - began > LEAST_SECONDS and i > 0:
                    break
    return times


def figures(times: Sequence[float]) -> Row:
    ordered = sorted(times)
    at = [ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)]
    return {"us": at[1], "low": at[0], "high": at[2], "best": ordered[0]}


def steps(arguments: argparse.Namespace, rates: dict[int, float]) -> Iterator[Step]:
    """Every M of every shape with every number of threads, whose read rate is put into `rates`."""
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rates[threads] = read_bandwidth()
        layers = parse_shapes(arguments.shapes)
        for shape in tqdm(layers, f"layers, {threads} threads", disable=None):
            torch._dynamo.reset()
            yield from _of_layer(shape, arguments, threads)


def _of_layer(shape: Shape, arguments: argparse.Namespace, threads: int) -> Iterator[Step]:
    group = shape.k if arguments.group == "column" else min(shape.k, arguments.group)
    spec = GemmSpec(1, shape.n, shape.k, arguments.bits, group, BF16, BF16, "cpu")
    weight, x = random_problem(spec, max(arguments.m), torch.device("cpu"))
    found, expected = list(ways(weight)), reference(x, weight, spec)
    for m in arguments.m:
        about = {
            "shapes": shape.source, "n": shape.n, "k": shape.k, "m": m, "bits": arguments.bits,
            "group": arguments.group, "threads": threads, "bytes": weight_bytes(spec),
        }  # fmt: skip
        name = f"{shape} M={m}, {threads} threads"
        yield name, partial(_identified, about, found, x[:m], expected[:m])


def _identified(about: Row, found: Sequence[Way], x: Tensor, expected: Tensor) -> list[Row]:
    return [about | row for row in _rows(found, x, expected)]


def _rows(found: Sequence[Way], x: Tensor, expected: Tensor) -> Iterator[Row]:
    calls: dict[str, Calls] = {}
    for way in found:
        own = x.to(way.dtype)
        try:
            began = time.perf_counter()
            error = (way.run(own, way.weights[0]).double() - expected).norm() / expected.norm()
            seconds = time.perf_counter() - began
        except Exception as problem:  # of a library that is measured
            yield {"contender": way.name, "failure": failure(problem)}
            continue
        if seconds > _MOST_SECONDS and not way.compiles:
            yield {"contender": way.name, "failure": f"is left out, a call takes {seconds:.1f} s"}
            continue
        if error > (_ALLOWED_LOOSE if way.loose else _ALLOWED):
            yield {"contender": way.name, "failure": f"relative error {float(error):.2g}"}
            continue
        calls[way.name] = [partial(way.run, own, w) for w in way.weights]
    times = interleaved(calls)
    details = {way.name: way.detail for way in found}
    for name, samples in times.items():
        yield {"contender": name, "detail": details[name], **figures(samples)}


@torch.no_grad()
def main(arguments: argparse.Namespace, results: Results) -> None:
    """What `bench kernels --device cpu` runs."""
    before = torch.get_num_threads()
    rates = results.settings["read_bandwidth"] = {}
    results.fill(steps(arguments, rates), arguments.time_budget)
    torch.set_num_threads(before)
    results.write()
    print(f"vectors {torch.backends.cpu.get_cpu_capability()}")
    print(failures(results.content, "contender"))
    show(results, cpu_kernels)
