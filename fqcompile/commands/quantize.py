"""fqcompile quantize CHECKPOINT OUT: quantize a Hugging Face checkpoint tensor by tensor."""

import argparse
from typing import Any

from fqcompile.checkpoint.stream import quantize_checkpoint
from fqcompile.commands import DTYPES, add_option_flags, given_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, output directory, and every FineQuant option."""
    parser.add_argument("checkpoint", help="directory with config.json and safetensors files")
    parser.add_argument("out", help="directory to write, for fqcompile.load")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the model (default: the config's)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with a run that was killed")
    existing.add_argument(
        "--overwrite", action="store_true", help="replace what is in OUT when all is written"
    )
    add_option_flags(parser, compiles=False)


def run(arguments: argparse.Namespace) -> None:
    options: Any = given_options(arguments)
    plan = quantize_checkpoint(
        arguments.checkpoint,
        arguments.out,
        dtype=DTYPES.get(arguments.dtype),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        say=print,
        **options,
    )
    print(plan)
