"""Our x86 kernel against PyTorch's and onnxruntime's, layer by layer, on a CPU.

    python -m bench kernels --device cpu [--shapes llama-3-8b 4096x4096] [--m 1,16,256] [--bits 4]
        [--group 128|column] [--threads 1,2] [--experts] [--json FILE] [--time-budget SECONDS]

Results are compared with fp64 before anything is timed. Then all ways run in turn, in one process,
each call on another copy of the weight, so that none finds it in a cache; of the calls of all
rounds the median, 20th and 80th percentile and the least. Microseconds, median/least. "read" is the
packed weight's bytes over the median of ours in bf16, and what it is of the rate at which this
machine, with as many threads, reads a large tensor.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from bench.core.results import Budget, Results, Row, failure, identity
from bench.core.shapes import OURS, Shape, parse_shapes
from bench.kernels.cpu_experts import EXPERTS, HIDDEN, TOP, ExpertLayer
from bench.kernels.cpu_ways import Way, ways
from fqcompile.kernels.roofline import weight_bytes
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.measure import random_problem, reference

BF16 = torch.bfloat16
ROUNDS, LEAST_SECONDS, MOST_CALLS = 7, 0.03, 12
_READ_BYTES = 256 << 20
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


def read_bandwidth() -> float:
    """Bytes a second at which PyTorch's threads read a large tensor: the fastest of its ways."""
    numbers = torch.ones(_READ_BYTES // 4)
    readers = {
        "sum": [numbers.sum],
        "dot": [lambda: torch.dot(numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :])],
        "max": [numbers.view(torch.int64).max],
    }
    return _READ_BYTES / min(min(found) for found in interleaved(readers).values()) * 1e6


def measured(shape: Shape, arguments: argparse.Namespace, results: Results, budget: Budget) -> None:
    """Adds the rows of one layer, for all its M."""
    group = shape.k if arguments.group == "column" else min(shape.k, arguments.group)
    spec = GemmSpec(1, shape.n, shape.k, arguments.bits, group, BF16, BF16, "cpu")
    weight, _ = random_problem(spec, 1, torch.device("cpu"))
    found = list(ways(weight))
    x = random_problem(spec, max(arguments.m), torch.device("cpu"))[1]
    expected = reference(x, weight, spec)
    threads = torch.get_num_threads()
    for m in arguments.m:
        if not budget.allows_a_step():
            results.leave_out(f"{shape} M={m}, {threads} threads")
            continue
        about = {
            "shapes": shape.source, "n": shape.n, "k": shape.k, "m": m, "bits": arguments.bits,
            "group": arguments.group, "threads": threads, "bytes": weight_bytes(spec),
        }  # fmt: skip
        results.add(*({**about, **row} for row in _rows(found, x[:m], expected[:m])))


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


def measured_experts(arguments: argparse.Namespace, results: Results) -> None:
    """Adds the rows of the expert layer, for 1 and 4 tokens."""
    layer = ExpertLayer(arguments.bits, arguments.group)
    others = layer.others()
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 4):
        choices = [torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(tokens)]
        ids = torch.cat(choices)
        x = torch.randn(tokens, HIDDEN, generator=generator).repeat_interleave(TOP, 0).to(BF16)
        calls: dict[str, Calls] = {f"{OURS} bf16": [partial(layer.ours, x, ids)]}
        calls[f"{OURS} fp32"] = [partial(layer.ours, x.float(), ids)]
        for name, (dtype, run) in others.items():
            calls[name] = [partial(run, x.to(dtype), ids)]
        about = {
            "shapes": "experts", "tokens": tokens, "hit": len(ids.unique()), "bits": arguments.bits,
            "group": arguments.group, "threads": torch.get_num_threads(),
            "bytes": layer.packed_bytes(ids),
        }  # fmt: skip
        times = interleaved(calls)
        results.add(*({**about, "contender": n, **figures(t)} for n, t in times.items()))


def table(rows: Sequence[Row], bandwidths: Mapping[int, float]) -> str:
    """A line for each layer, M and number of threads; a column for each way."""
    names = list(dict.fromkeys(row["contender"] for row in rows if "us" in row))
    lines: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        expert = row["shapes"] == "experts"
        layer = f"experts, {row['hit']} hit" if expert else f"{row['n']}x{row['k']}"
        key = (layer, row["tokens"] if expert else row["m"], row["threads"])
        lines.setdefault(key, {})[row["contender"]] = row
    body = []
    for (layer, m, threads), found in sorted(lines.items(), key=lambda item: item[0][2]):
        times = [found.get(name, {}) for name in names]
        cells = [f"{row['us']:.0f}/{row['best']:.0f}" if "us" in row else "" for row in times]
        ours = found[f"{OURS} bf16"]
        rate = ours["bytes"] / ours["us"] * 1e6
        read = f"{rate / 1e9:.1f} GB/s, {rate / bandwidths[threads]:.0%}"
        body.append([layer, m, threads, *cells, read])
    return tabulate(body, ["layer", "M", "thr", *names, "read"], disable_numparse=True)


def run(arguments: argparse.Namespace, results: Results) -> dict[int, float]:
    """Fills `results`; the read bandwidth by number of threads."""
    budget, bandwidths = Budget(arguments.time_budget), {}
    before = torch.get_num_threads()
    shapes = parse_shapes(arguments.shapes)
    with torch.no_grad():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            bandwidths[threads] = read_bandwidth()
            for shape in tqdm(shapes, f"layers, {threads} threads", disable=None):
                torch._dynamo.reset()
                measured(shape, arguments, results, budget)
            if arguments.experts:
                measured_experts(arguments, results)
    torch.set_num_threads(before)
    return bandwidths


def main(arguments: argparse.Namespace, results: Results) -> None:
    """What `bench kernels --device cpu` runs."""
    bandwidths = run(arguments, results)
    results.settings["read_bandwidth"] = bandwidths
    results.write()
    about = {**identity(torch.device("cpu")), "vectors": torch.backends.cpu.get_cpu_capability()}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for row in results.rows:
        if "failure" in row:
            print(f"{row['contender']} at {row['n']}x{row['k']} M={row['m']}: {row['failure']}")
    if results.left_out:
        print(f"left out {len(results.left_out)}: {', '.join(results.left_out)}")
    rates = ", ".join(f"{t} threads {rate / 1e9:.1f}" for t, rate in bandwidths.items())
    print(f"\nint{arguments.bits}, group {arguments.group}; this machine reads, GB/s: {rates}\n")
    print(table(results.rows, bandwidths))
