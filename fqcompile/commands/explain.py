"""fqcompile explain MODEL: print the quantization plan of a model without compiling it."""

import argparse
from typing import Any

import torch

from fqcompile.commands import DTYPES, add_option_flags, given_options, load_model
from fqcompile.explain import explain
from fqcompile.files.trusted import replace_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, where to write the plan, and every FineQuant option."""
    parser.add_argument(
        "model", help="directory of a Hugging Face checkpoint, or module:function that returns "
        "(model, example inputs)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="type of a loaded checkpoint"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the plan as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write the plan as a page")
    add_option_flags(parser, compiles=True)


def run(arguments: argparse.Namespace) -> None:
    model, inputs = load_model(arguments.model, DTYPES[arguments.dtype])
    options: Any = given_options(arguments)
    with torch.no_grad():
        plan = explain(model, *inputs, **options)
    print(plan)
    if arguments.json:
        replace_text(arguments.json, plan.to_json())
    if arguments.html:
        plan.to_html(arguments.html)
