"""fqcompile tune: measure kernel configurations on this machine's GPU, and keep the fastest."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from fqcompile.commands import counts, group_size, load_model
from fqcompile.errors import FineQuantError, OptionError
from fqcompile.explain import gemm_specs
from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.spec import GemmSpec, Gpu, gpu_of
from fqcompile.kernels.template import Template
from fqcompile.kernels.tuning.key import Bucket, Ends, bucket_of, tuning_key
from fqcompile.kernels.tuning.launches import ends_in_a_model, search
from fqcompile.kernels.tuning.measure import DeviceLost, check_device, measure_on_gpu
from fqcompile.kernels.tuning.table import table_for
from fqcompile.report.tuning_case import TuningCase, searched_case
from fqcompile.report.tuning_report import SUFFIXES, TuningReport
from fqcompile.tensor.format import NORMAL, UNIFORM, QType, qtype_for

Routing = Literal["grouped", "gathered"]
ROUTINGS: tuple[Routing, ...] = ("grouped", "gathered")
DEFAULT_GROUP = 128
# N x K of a matrix, or E x N x K of a stack of experts.
_SHAPE = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICE = torch.device("cuda")
_NOTES = (
    "Before a configuration is timed, its result is compared with fp64; a wrong one is refused.",
    "A time is one call's, from replays of a CUDA graph whose calls read other copies of the "
    "weight in turn, so that none finds it in the L2 cache: the median of 25, and the 20th and "
    "80th percentile; the spread is from one to the other. Configurations are measured one after "
    "the other, now or in an earlier run on this machine with these versions.",
    "Of the roofline: the lower bound set by memory or matrix units, over the measured time.",
)


class _Search(NamedTuple):
    """A matmul to tune at one bucket of M, for all rows between `ends`."""

    spec: GemmSpec
    template: Template
    bucket: Bucket
    ends: Ends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The matmuls to tune, the size of the search, and the report files."""
    parser.add_argument(
        "target", nargs="+", help="directory of a checkpoint, module:function as for explain, or "
        "a shape: NxK such as 4096x14336, ExNxK of experts",
    )  # fmt: skip
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="bits of the weights")
    parser.add_argument(
        "--levels", choices=(NORMAL, UNIFORM), default=NORMAL, help="of weights of 4 bits"
    )
    parser.add_argument(
        "--group", type=group_size, metavar="SIZE", help='size along K, or "column" (default: '
        f"{DEFAULT_GROUP} for a shape, what is chosen for each matrix of a model)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="type of the activations")
    parser.add_argument("--gated", action="store_true", help="shapes are of gate and up, 2N x K")
    parser.add_argument(
        "--m", type=counts, metavar="M,...", help="numbers of rows, each for its bucket "
        "(default: 1, and what a model with an open batch looks up)",
    )  # fmt: skip
    parser.add_argument(
        "--routing", choices=ROUTINGS, help="how rows of experts are routed (default: both), each "
        "token once for each of its experts",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("fast", "max"), default="fast",
        help="fast: at most 12 configurations of each case; max: all",
    )  # fmt: skip
    parser.add_argument(
        "--report", action="append", type=_report_file, default=[], metavar="FILE",
        help="also write every configuration, with its time or why it was refused, as .json or "
        ".html; may be given twice",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    gpu = gpu_of(_DEVICE)
    table = table_for(gpu)
    specs = [spec for target in arguments.target for spec in _specs(target, arguments, gpu)]
    searches, untuned = _searches(specs, arguments.m)
    cases: dict[object, TuningCase] = {}
    try:
        for spec, template, bucket, ends in tqdm(searches, "cases", disable=None):
            found = search(template, spec, bucket, arguments.mode, measure_on_gpu, table, ends)
            case = searched_case(spec, template, bucket, *found)
            cases[case.tuning["key"], bucket] = case
            if found.problem is not None and torch.cuda.is_available():
                check_device(FineQuantError(found.problem))
    except (DeviceLost, KeyboardInterrupt) as end:
        raise FineQuantError(
            f"{str(end) or 'stopped'}; what was measured is kept in {table.path}, and the same "
            "command goes on"
        ) from None
    about = {"fingerprint": table.fingerprint, "table": str(table.path), "mode": arguments.mode}
    report = TuningReport([*cases.values()], about, notes=_NOTES, left_out=untuned)
    print("\n".join(filter(None, (str(report), f"kept in {table.path}"))))
    for path in arguments.report:
        report.write(path)


def _searches(specs: list[GemmSpec], rows: list[int] | None) -> tuple[list[_Search], list[str]]:
    """One case per key, bucket and ends, and a line for each matmul with nothing to search."""
    searches: dict[object, _Search] = {}
    untuned: dict[str, None] = {}
    for spec in specs:
        template = select_kernel(spec).template
        if template.launches(spec) is None:
            text = f"{spec.n}x{spec.k} {spec.qtype.name} g{spec.group_size}"
            untuned[f"{text}: kernel {template.name} has no configuration to search"] = None
            continue
        each = [(bucket_of(m, spec),) for m in rows] if rows else ends_in_a_model(spec, template)
        key = tuning_key(spec, template.layout.name)
        for ends in each:
            for bucket in ends:
                searches.setdefault((key, bucket, ends), _Search(spec, template, bucket, ends))
    return list(searches.values()), list(untuned)


def _specs(target: str, arguments: argparse.Namespace, gpu: Gpu) -> list[GemmSpec]:
    dtype = _DTYPES[arguments.dtype]
    qtype = qtype_for(arguments.bits, arguments.levels)
    group, gated, routing = arguments.group, arguments.gated, arguments.routing
    found = specs_of_shape(target, qtype, group, dtype, gated, routing, _DEVICE.type, gpu)
    return _specs_of_model(target, dtype, arguments, gpu) if found is None else found


def _specs_of_model(
    name: str, dtype: torch.dtype, arguments: argparse.Namespace, gpu: Gpu
) -> list[GemmSpec]:
    model, inputs = load_model(name, dtype)
    options = {"bits": arguments.bits, "levels": qtype_for(arguments.bits, arguments.levels).levels}
    if arguments.group is not None:
        options["granularity"] = arguments.group
    with torch.no_grad():
        on_gpu = [x.to(_DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
        found = gemm_specs(model.to(_DEVICE), *on_gpu, **options)
    return [replace(spec, device_type="cuda", gpu=gpu) for spec in found]


def specs_of_shape(
    text: str,
    qtype: QType,
    group: int | str | None,
    dtype: torch.dtype,
    gated: bool,
    routing: Routing | None,
    device_type: str,
    gpu: Gpu | None,
) -> list[GemmSpec] | None:
    """The matmuls of a shape such as "4096x14336"; for experts one per routing; None if no shape.

    `group` is a size along K, "column" (per-channel), or None for 128; scales have the dtype of the
    activations.

    Raises:
        OptionError: a side is empty.
    """
    shape = _SHAPE.fullmatch(text)
    if shape is None:
        return None
    experts, n, k = (int(side or 0) for side in shape.groups())
    if not n or not k or (shape[1] and not experts):
        raise OptionError(f"shape {text!r} has an empty side; E, N and K are at least 1")
    size = k if group == "column" else min(k, int(group or DEFAULT_GROUP))
    spec = GemmSpec(
        1, n, k, qtype.bits, size, dtype, dtype, device_type,
        gated=gated, gpu=gpu, levels=qtype.levels,
    )  # fmt: skip
    if not experts:
        return [spec]
    asked = ROUTINGS if routing is None else (routing,)
    return [replace(spec, experts=experts, routing=one) for one in asked]


def _report_file(text: str) -> Path:
    """Check the report's file name before anything is measured."""
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of {', '.join(SUFFIXES)}")
    return Path(text)
