"""Our x86 kernel against PyTorch's and onnxruntime's, layer by layer, on a CPU.

    python -m bench kernels --device cpu [--shapes llama-3-8b 4096x4096] [--m 1,16,256] [--bits 4]
        [--group 128|column] [--threads 1,2] [--json FILE] [--time-budget SECONDS]

Results are compared with fp64 before anything is timed. Then all ways run in turn, in one process,
each call on another copy of the weight, so that none finds it in a cache; of 25 calls the median,
20th and 80th percentile in microseconds. "read rate" is the packed weight's bytes over the median
of ours in bf16, of the rate at which this machine, with as many threads, reads a large tensor. For
one row the last table has GB/s of all of ours, by the size of the weight.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from bench.core.measure import Replay, microseconds, recorded_on_cpu, relative_error, timed_if_right
from bench.core.results import Results, Row, Step
from bench.core.section import failures, show, table
from bench.core.shapes import OURS, Shape, parse_shapes
from bench.kernels.cpu_ways import Way, ways
from bench.kernels.section import cpu_kernels
from fqcompile.kernels.roofline import read_bandwidth, weight_bytes
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.measure import WrongResult, random_problem, reference

BF16 = torch.bfloat16
_MOST_SECONDS = 1.5  # a call; PyTorch's int4 kernel takes 20 for 256 rows of fp32
# Rounding of x and y to bf16; int8 activations add half a step of 1/127 of a row's largest.
_ALLOWED, _ALLOWED_LOOSE = 2.0**-7, 0.03


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
        yield name, partial(_rows, about, found, x[:m], expected[:m])


def _rows(about: Row, found: Sequence[Way], x: Tensor, expected: Tensor) -> Iterator[Row]:
    """A row for each way: its timing, or why there is none."""
    ready = {way.name: partial(_recorded, way, x.to(way.dtype), expected) for way in found}
    times, why = timed_if_right(ready)
    for way in found:
        row = about | {"contender": way.name}
        if way.name in why:
            yield row | {"failure": why[way.name]}
        else:
            yield row | {"detail": way.detail, **microseconds(times[way.name])}


def _recorded(way: Way, x: Tensor, expected: Tensor) -> Replay:
    """Ready to be timed.

    Raises:
        WrongResult: it computes something else.
        TimeoutError: a call takes too long.
    """
    began = time.perf_counter()
    error = relative_error(way.run(x, way.weights[0]), expected)
    seconds = time.perf_counter() - began
    if seconds > _MOST_SECONDS and not way.compiles:
        raise TimeoutError(f"a call takes {seconds:.1f} s")
    if not error <= (_ALLOWED_LOOSE if way.loose else _ALLOWED):
        raise WrongResult(f"relative error {error:.2g}")
    return recorded_on_cpu([partial(way.run, x, weight) for weight in way.weights])


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
    print(f"\n{_read_table(results.content['rows'], rates)}")


def _read_table(rows: Sequence[Row], rates: dict[int, float]) -> str:
    """GB/s of the packed weights of one row, and what share of the machine's they are."""
    lines = []
    for row in rows:
        if row["m"] == 1 and row["contender"].startswith(OURS) and "us" in row:
            speed, most = row["bytes"] / row["us"] / 1e3, rates[row["threads"]] / 1e9
            size = f"{row['bytes'] / 1e6:.2f}"
            layer = f"{row['n']} x {row['k']}"
            told = (f"{speed:.1f}", f"{most:.1f}", f"{speed / most:.0%}")
            lines.append((layer, size, row["threads"], row["contender"], *told))
    return table(lines, ("layer", "MB", "threads", "way", "GB/s", "machine", "share"))
