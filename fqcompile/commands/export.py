"""fqcompile export SOURCE OUT: write a checkpoint for serving engines."""

import argparse
from typing import Any

from fqcompile.commands import DTYPES, add_option_flags, given_options
from fqcompile.interop.export import export
from fqcompile.interop.export_request import FORMATS, PROFILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, output directory, target engines, and every FineQuant option."""
    parser.add_argument(
        "source", help="quantized directory (fqcompile.save, `fqcompile quantize`, "
        "save_pretrained), or a Hugging Face checkpoint to quantize",
    )  # fmt: skip
    parser.add_argument("out", help="directory to write, which must not exist yet")
    parser.add_argument(
        "--to", choices=FORMATS, default=FORMATS[0], help="format of the checkpoint"
    )
    parser.add_argument(
        "--profile", metavar=f"{{{','.join(PROFILES)}}}", default="portable", help="serve: vLLM "
        "and SGLang; portable: transformers too, with one scheme for all experts",
    )  # fmt: skip
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="highest degree of tensor parallelism"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the model (default: the config's)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an export that was killed"
    )
    add_option_flags(parser, compiles=False)


def run(arguments: argparse.Namespace) -> None:
    options: Any = given_options(arguments)
    plan = export(
        arguments.source,
        arguments.out,
        to=arguments.to,
        profile=arguments.profile,
        tp=arguments.tp,
        dtype=DTYPES.get(arguments.dtype),
        resume=arguments.resume,
        say=print,
        **options,
    )
    print(plan)
