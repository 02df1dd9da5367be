"""fqcompile tune: measure kernel configurations on this machine's GPU, and keep the fastest."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from fqcompile.commands.argument_types import counts, group_size
from fqcompile.commands.checkpoints import load_model
from fqcompile.commands.tune_report import TunedCase, format_cases, report_of
from fqcompile.errors import FineQuantError, OptionError
from fqcompile.gemm_specs import gemm_specs
from fqcompile.kernels.gpu import Gpu, gpu_of
from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.key import bucket_of, tuning_key
from fqcompile.kernels.tuning.launches import buckets_of_a_model
from fqcompile.kernels.tuning.measure import measure_on_gpu
from fqcompile.kernels.tuning.search import search
from fqcompile.kernels.tuning.table import TunedTable, table_for
from fqcompile.report.files import replace_text

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SHAPE = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)")
_ROUTINGS: tuple[Literal["grouped", "gathered"], ...] = ("grouped", "gathered")
_DEFAULT_GROUP = 128
_DEVICE = torch.device("cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to tune, how widely to search, where to write the report."""
    parser.add_argument(
        "target", nargs="+", help="directory of a Hugging Face checkpoint, module:function that "
        "returns (model, example inputs), the N x K of a matrix, such as 4096x14336, or E x N x K "
        "of a stack of experts",
    )  # fmt: skip
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument(
        "--group", type=group_size, metavar="SIZE", help='size along K, or "column" (default: '
        f"{_DEFAULT_GROUP} for a shape, what is chosen for each matrix of a model)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the activations")
    parser.add_argument("--gated", action="store_true", help="shapes are of gate and up, 2N x K")
    parser.add_argument(
        "--m", type=counts, metavar="M,...", help="numbers of rows, each for its bucket "
        "(default: 1, and what a model with an open batch looks up)",
    )  # fmt: skip
    parser.add_argument(
        "--routing", choices=_ROUTINGS, help="of experts (default: both); their rows are routed "
        "ones, tokens times experts of each",
    )  # fmt: skip
    parser.add_argument("--mode", choices=("fast", "max"), default="fast")
    parser.add_argument("--report", metavar="FILE", help="also write every trial as JSON")


def run(arguments: argparse.Namespace) -> None:
    gpu = gpu_of(_DEVICE)
    table = table_for(gpu)
    specs = [spec for target in arguments.target for spec in _specs(target, arguments, gpu)]
    cases, untuned = _cases(specs, arguments.m)
    try:
        for case in tqdm(cases, "cases", disable=None):
            _tune(case, arguments.mode, table)
    except KeyboardInterrupt:
        raise FineQuantError(
            f"stopped; what was measured is kept in {table.path}, and the same command goes on"
        ) from None
    print("\n".join([*format_cases(cases), *untuned, f"kept in {table.path}"]))
    if arguments.report:
        content = report_of(cases, arguments.mode, table)
        replace_text(Path(arguments.report), json.dumps(content, indent=2))


def _tune(case: TunedCase, mode: Any, table: TunedTable) -> None:
    known = table.case(case.key, case.bucket)
    if known.has(mode):
        case.known, case.problem = known, known.failure
        return
    case.known, case.problem = search(
        case.template, case.spec, case.bucket, mode, measure_on_gpu, table
    )


def _cases(specs: list[GemmSpec], rows: list[int] | None) -> tuple[list[TunedCase], list[str]]:
    """One case for each key and bucket, and a line for each matmul without anything to search."""
    cases: dict[object, TunedCase] = {}
    untuned: dict[str, None] = {}
    for spec in specs:
        template = select_kernel(spec).template
        if template.launches(spec) is None:
            text = f"{spec.n}x{spec.k} int{spec.bits} g{spec.group_size}"
            untuned[f"{text}: kernel {template.name} has no configuration to search"] = None
            continue
        buckets = [bucket_of(m, spec) for m in rows] if rows else buckets_of_a_model(spec, template)
        key = tuning_key(spec, template.layout.name)
        for bucket in buckets:
            cases.setdefault((key, bucket), TunedCase(spec, template, key, bucket))
    return list(cases.values()), list(untuned)


def _specs(target: str, arguments: argparse.Namespace, gpu: Gpu) -> list[GemmSpec]:
    dtype = _DTYPES[arguments.dtype]
    shape = _SHAPE.fullmatch(target)
    if shape is None:
        return _specs_of_model(target, dtype, arguments, gpu)
    experts, n, k = (int(side or 0) for side in shape.groups())
    if not n or not k or (shape[1] and not experts):
        raise OptionError(f"shape {target!r} has an empty side; E, N and K are at least 1")
    group = k if arguments.group == "column" else min(k, arguments.group or _DEFAULT_GROUP)
    spec = GemmSpec(1, n, k, arguments.bits, group, dtype, dtype, _DEVICE.type, gpu=gpu)
    spec = replace(spec, gated=arguments.gated)
    if not experts:
        return [spec]
    asked = _ROUTINGS if arguments.routing is None else (arguments.routing,)
    return [replace(spec, experts=experts, routing=routing) for routing in asked]


def _specs_of_model(
    name: str, dtype: torch.dtype, arguments: argparse.Namespace, gpu: Gpu
) -> list[GemmSpec]:
    model, inputs = load_model(name, dtype)
    options = {"bits": arguments.bits}
    if arguments.group is not None:
        options["granularity"] = arguments.group
    with torch.no_grad():
        on_gpu = [x.to(_DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
        found = gemm_specs(model.to(_DEVICE), *on_gpu, **options)
    return [replace(spec, device_type="cuda", gpu=gpu) for spec in found]
