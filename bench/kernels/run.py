"""Our kernels against cuBLAS, torch.compile and other libraries, layer by layer, on a GPU
(on a CPU: see `kernels.cpu`).

    python -m bench kernels --device cuda [--quick] [--shapes llama-3-8b 4096x4096] [--m 1,16,256]
        [--bits 4] [--group 128|column] [--dtype bf16|fp16] [--tune fast|max]
        [--baselines NAME ...] [--json FILE] [--time-budget SECONDS]

Before a contender is timed its result is compared with fp64. Then all are timed in turn, from CUDA
graphs, each call on another copy of the weight, so that none finds it in the L2 cache; 25 replays:
the median, 20th and 80th percentile. "of ideal" is the least time that memory or matrix units allow
for the quantized layer (`fqcompile.kernels.roofline`) over the time measured. The file is whole
after every M of a layer, and names what the time budget left out.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench.core.measure import LEASE, MANY_COMPILATIONS, Record, recorded_on_gpu
from bench.core.results import Results, Row, Step, duration
from bench.core.section import show
from bench.core.shapes import DTYPES, SHAPES, Shape, parse_shapes
from bench.kernels import cpu as kernels_cpu
from bench.kernels.baselines import BASELINES, MAX_AUTOTUNE
from bench.kernels.contenders import Problem
from bench.kernels.rows import Layer, identified, measured_rows
from bench.kernels.section import gpu_kernels
from fqcompile.commands import counts as row_counts
from fqcompile.commands import group_size
from fqcompile.kernels.spec import GemmSpec, Gpu, gpu_of
from fqcompile.kernels.tuning.launches import Mode

ROWS = (1, 4, 16, 64, 128, 256, 512, 2048)
CPU_SHAPES = ("llama-3-8b", "opt-6.7b", "encoders")
QUICK_SHAPES, QUICK_ROWS = ("llama-3-8b", "8192x8192"), (1, 16, 64, 256)


def specs(shape: Shape, arguments: argparse.Namespace, gpu: Gpu, device: str) -> list[GemmSpec]:
    """The layer at each M. Scales are stored in the activations' type, as the backend does."""
    dtype = DTYPES[arguments.dtype]
    group = shape.k if arguments.group == "column" else min(shape.k, arguments.group)
    layer = GemmSpec(1, shape.n, shape.k, arguments.bits, group, dtype, dtype, device, gpu=gpu)
    return [replace(layer, m=m) for m in arguments.m]


def steps(
    arguments: argparse.Namespace, device: torch.device, gpu: Gpu, record: Record
) -> Iterator[Step]:
    """Every M of every shape, whose contenders are set up by the first that there is time for."""
    for shape in tqdm(parse_shapes(arguments.shapes), "layers", disable=None):
        cases = specs(shape, arguments, gpu, device.type)
        most = replace(cases[0], m=max(arguments.m))
        layer = cache(partial(_layer, most, device, arguments.baselines))
        for spec in cases:
            yield f"{shape} M={spec.m}", partial(_rows, layer, shape, spec, arguments.tune, record)


def _layer(spec: GemmSpec, device: torch.device, baselines: Sequence[str]) -> Layer:
    return Layer(Problem(spec, device), baselines)


def _rows(
    layer: Callable[[], Layer], shape: Shape, spec: GemmSpec, tune: Mode, record: Record
) -> list[Row]:
    return [identified(row, shape, spec) for row in measured_rows(layer(), spec, tune, record)]


@torch.no_grad()
def run(arguments: argparse.Namespace, device: torch.device, gpu: Gpu, record: Record) -> Results:
    """Everything that the arguments ask for, or what the time budget allows of it."""
    results = Results.of(arguments, device)
    results.fill(steps(arguments, device, gpu, record), arguments.time_budget)
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    usual = [name for name in BASELINES if name != MAX_AUTOTUNE]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", metavar="NAME|NxK", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--m", type=row_counts, metavar="M,...", help=f"rows (default: {ROWS})")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group", type=group_size, default=128, help='size along K, or "column"')
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tune", choices=("off", "fast", "max"), default="off")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=usual)
    parser.add_argument("--threads", type=row_counts, metavar="T,...", help="a CPU: how many")
    parser.add_argument("--quick", action="store_true", help="five layers at four M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and identity there")
    parser.add_argument("--time-budget", type=duration, default=LEASE, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    shapes = CPU_SHAPES if arguments.device == "cpu" else SHAPES
    arguments.shapes = arguments.shapes or list(QUICK_SHAPES if arguments.quick else shapes)
    arguments.threads = arguments.threads or [1, torch.get_num_threads()]
    arguments.m = arguments.m or list(QUICK_ROWS if arguments.quick else ROWS)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.device == "cpu":
        kernels_cpu.main(arguments, Results.of(arguments, torch.device("cpu")))
        return
    device = torch.device(arguments.device)
    # Each M is a compilation of its own of one function.
    with torch._dynamo.config.patch(MANY_COMPILATIONS):
        results = run(arguments, device, gpu_of(device), recorded_on_gpu)
    show(results, gpu_kernels)


if __name__ == "__main__":
    main()
