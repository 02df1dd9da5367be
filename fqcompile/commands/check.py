"""fqcompile check CHECKPOINT: find problems an engine would have with a checkpoint."""

import argparse
import json
from dataclasses import asdict

from fqcompile.errors import CheckpointError
from fqcompile.interop.check import DEVICES, check
from fqcompile.interop.findings import findings_table
from fqcompile.interop.quantization_config import ENGINES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and how it will be served."""
    parser.add_argument("checkpoint", help="directory with config.json and safetensors files")
    parser.add_argument(
        "--engine", choices=ENGINES, default="vllm", help="that loads the checkpoint"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cuda", help="device that the engine runs on"
    )
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="degree of tensor parallelism"
    )
    parser.add_argument(
        "--ep",
        type=int,
        default=1,
        metavar="N",
        help="degree of expert parallelism: experts stay whole",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> None:
    found = check(
        arguments.checkpoint,
        arguments.engine,
        tp=arguments.tp,
        ep=arguments.ep,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print(findings_table(found) if found else f"{arguments.engine}: nothing found")
    bad = sum(not finding.loads for finding in found)
    if bad:
        raise CheckpointError(
            f"{arguments.engine} would not load {arguments.checkpoint} as it was meant: "
            f"{bad} findings"
        )
