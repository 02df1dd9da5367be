"""Autotuning, shown: every candidate of each matmul with its time, its share of the roofline or why
it was refused; the best of each bucket of M; what the choice without measuring loses to it.

    python -m bench tune [--quick] [--device cuda|cpu] [--shapes llama-3-8b 4096x4096 128x768x2048]
        [--m 1,16,64] [--bits 4] [--group 128|column] [--dtype bf16|fp16|fp32] [--mode fast|max]
        [--threads T] [--json FILE] [--html FILE] [--time-budget SECONDS]

On a GPU the autotuner's own search runs, with an empty table, and keeps nothing; then the best and
the closed form's configuration are measured once more, in turn. No kernel for CPUs has anything to
search: there the candidates are the kernels themselves, all in turn, and the choice is the selected
one. Every result is compared with fp64 before it is timed.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench.core.measure import LEASE, Record, recorded_on_cpu, recorded_on_gpu
from bench.core.results import Results, Row
from bench.core.shapes import SHAPES
from bench.tune.cases import compared_on_cpu, searched_on_gpu
from fqcompile.commands.arguments import counts as row_counts
from fqcompile.commands.arguments import group_size
from fqcompile.commands.tune import ROUTINGS, specs_of_shape
from fqcompile.errors import FineQuantError, OptionError
from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.roofline import read_bandwidth
from fqcompile.kernels.spec import GemmSpec, Gpu, gpu_of
from fqcompile.kernels.tuning.key import M_BUCKETS, bucket_of, fingerprint, kernel_source_hash
from fqcompile.kernels.tuning.measure import measure_on_gpu
from fqcompile.kernels.tuning.search import MakeMeasure, at_bucket
from fqcompile.kernels.tuning.table import TunedTable
from fqcompile.report.tuning_case import TuningCase
from fqcompile.report.tuning_report import TuningReport

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
USUAL_SHAPES, QUICK_SHAPES = ("llama-3-8b", "encoders"), ("4096x4096", "1536x384")
GPU_ROWS, CPU_ROWS, QUICK_ROWS = (*M_BUCKETS, 2048), (1, 4, 16, 64), (1, 16, 64)
CHECKED = "Before a candidate is timed, its result is compared with fp64; a wrong one is refused."
IN_TURN = (
    "Each call reads another copy of the weight, so that none finds it in a cache. Times are the "
    "median, 20th and 80th percentile of 25; the spread is from one to the other, and differences "
    "below it are none."
)
ON_GPU = (
    "The search measures one configuration after the other, in CUDA graphs. Where the closed form "
    "is not the best, both were then measured once more, in turn: these times are compared."
)
ON_CPU = (
    "No kernel for CPUs has a configuration to search. What is compared are the kernels, single "
    "calls in turn; the selected kernel is the first in the registry's order that takes the matmul."
)


@dataclass
class Run:
    """What was measured so far, into `results` at once."""

    arguments: argparse.Namespace
    device: torch.device
    gpu: Gpu | None
    record: Record
    make_measure: MakeMeasure
    results: Results
    cases: list[TuningCase] = field(default_factory=list)

    def measure_all(self, table: TunedTable | None) -> None:
        """Every case that the time budget allows; the others are named."""
        specs = tqdm(asked_for(self.arguments, self.gpu), "cases", disable=None)
        steps = ((_name(spec), partial(self._rows, spec, table)) for spec in specs)
        self.results.fill(steps, self.arguments.time_budget)

    def _rows(self, spec: GemmSpec, table: TunedTable | None) -> list[Row]:
        case = self._case(spec, table)
        self.cases.append(case)
        return [case.as_dict()]

    def _case(self, spec: GemmSpec, table: TunedTable | None) -> TuningCase:
        if table is None:
            return compared_on_cpu(spec, self.record)
        template = select_kernel(spec).template
        if template.launches(spec) is None:
            raise OptionError(f"kernel {template.name} has no configuration to search")
        bucket, mode = bucket_of(spec.m, spec), self.arguments.mode
        how = (self.make_measure, table, self.record, self.device)
        return searched_on_gpu(spec, bucket, mode, *how)


def asked_for(arguments: argparse.Namespace, gpu: Gpu | None) -> list[GemmSpec]:
    """Every matmul of the shapes at every number of rows; of experts with each routing.

    Raises:
        OptionError: a shape is none.
    """
    texts = [text for name in arguments.shapes for text in _texts(name)]
    a, device_type = arguments, "cpu" if gpu is None else "cuda"
    form = (a.bits, a.group, DTYPES[a.dtype], a.gated, a.routing, device_type, gpu)
    specs: dict[GemmSpec, None] = {}
    for text in texts:
        found = specs_of_shape(text, *form)
        if found is None:
            known = ", ".join(SHAPES)
            raise OptionError(f"shape {text!r} is neither NxK, nor ExNxK, nor one of {known}")
        specs.update((_at(spec, m), None) for spec in found for m in arguments.m)
    return list(specs)


def _at(spec: GemmSpec, m: int) -> GemmSpec:
    """With the rows to measure: on a GPU those of m's bucket, which share its configuration."""
    return replace(spec, m=m) if spec.gpu is None else at_bucket(spec, bucket_of(m, spec))


def _texts(name: str) -> list[str]:
    return [f"{n}x{k}" for n, k in SHAPES[name]] if name in SHAPES else [name]


def _name(spec: GemmSpec) -> str:
    stack = f"{spec.experts}x" if spec.experts else ""
    return f"{stack}{spec.n}x{spec.k} M={spec.m}" + (f" {spec.routing}" if spec.routing else "")


def run(
    arguments: argparse.Namespace,
    device: torch.device,
    gpu: Gpu | None,
    record: Record,
    make_measure: MakeMeasure = measure_on_gpu,
) -> TuningReport:
    """Everything that the arguments ask for, or what the time budget allows of it.

    With a `gpu` its configurations are searched, without one kernels are compared on the CPU.
    """
    results = Results.of(arguments, device)
    if gpu is None:
        results.settings["read_bandwidth"] = read_bandwidth()
    one = Run(arguments, device, gpu, record, make_measure, results)
    with torch.no_grad(), _fresh_table(gpu) as table:
        one.measure_all(table)
    about = {**results.identity, **results.settings}
    choice = "selected kernel" if gpu is None else "closed form"
    return TuningReport(one.cases, about, choice, _notes(gpu), results.left_out)


@contextmanager
def _fresh_table(gpu: Gpu | None) -> Iterator[TunedTable | None]:
    """An empty one, gone afterwards: what is shown is measured now. None on a CPU."""
    if gpu is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        here = fingerprint(gpu, kernel_source_hash())
        yield TunedTable.load(Path(folder) / "tuned.json", here)


def _notes(gpu: Gpu | None) -> list[str]:
    if gpu is not None:
        memory, matrix = gpu.bandwidth / 1e12, gpu.matrix_flops / 1e12
        roofline = f"{memory:.2f} TB/s of memory or {matrix:.0f} TFLOP/s of the matrix units allow"
        return [CHECKED, ON_GPU, IN_TURN, f"Of the roofline: the least time that {roofline}."]
    rate, threads = read_bandwidth() / 1e9, torch.get_num_threads()
    roofline = (
        f"Of the roofline: codes, scales, x and y moved once at {rate:.1f} GB/s, the rate at which "
        f"PyTorch reads memory here, by {threads} threads. Computing is not counted, so the share "
        "falls with many rows although nothing is amiss."
    )
    return [CHECKED, ON_CPU, IN_TURN, roofline]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here)
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME|NxK|ExNxK", help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--m", type=row_counts, metavar="M,...", help="rows, on a GPU each for its bucket"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group", type=group_size, default=128, help='size along K, or "column"')
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations")
    parser.add_argument("--gated", action="store_true", help="shapes are of gate and up, 2N x K")
    parser.add_argument("--routing", choices=ROUTINGS, help="of experts (default: both)")
    parser.add_argument("--mode", choices=("fast", "max"), default="fast", help="a GPU's search")
    parser.add_argument(
        "--threads", type=_threads, metavar="T", help="of a CPU (default: PyTorch's)"
    )
    parser.add_argument("--quick", action="store_true", help="two layers at three M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="cases and identity, as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with plots, for offline")
    parser.add_argument("--time-budget", type=float, default=LEASE, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or list(QUICK_SHAPES if arguments.quick else USUAL_SHAPES)
    usual = GPU_ROWS if arguments.device == "cuda" else CPU_ROWS
    arguments.m = arguments.m or list(QUICK_ROWS if arguments.quick else usual)
    return arguments


def _threads(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads, which is 1 at least")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    threads = torch.get_num_threads()
    arguments.threads = arguments.threads or threads
    try:
        torch.set_num_threads(arguments.threads)
        if arguments.device == "cuda":
            report = run(arguments, device, gpu_of(device), recorded_on_gpu)
        else:
            report = run(arguments, device, None, recorded_on_cpu)
    except FineQuantError as error:
        raise SystemExit(f"bench tune: {error}") from error
    finally:
        torch.set_num_threads(threads)
    show(report)
    if arguments.html:
        print(f"wrote {report.to_html(arguments.html)}")


def show(report: TuningReport) -> None:
    """What it was measured on and how; the table last."""
    print(", ".join(f"{key} {value}" for key, value in report.about.items()))
    print("\n".join(report.notes), end="\n\n")
    print(report)


if __name__ == "__main__":
    main()
