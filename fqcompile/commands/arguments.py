"""What commands share of their arguments: types that argparse calls, and FineQuant's options.

The options have the same names as everywhere, values as JSON or plain words.
"""

import argparse
import json
from dataclasses import fields

import torch

from fqcompile.config import FineQuantConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What `--help` says of each option.
_HELP = {
    "bits": "bits of a quantized weight: 4 or 8 (default: 4)",
    "granularity": "group size along K, or the rule that chooses it: adaptive, range, column",
    "alpha": "range: finer groups while the mean range shrinks below this factor (default: 0.9)",
    "min_group_size": "smallest group size that a rule may choose (default: 32)",
    "error_budget": "largest relative error of a matrix: finer groups, then 8 bits, until met",
    "scale_method": "mse: search the scale of each group; absmax: the largest weight decides",
    "include": "quantize only weights whose names match one of these regular expressions",
    "exclude": "leave weights whose names match one of these regular expressions",
    "overrides": 'options for some weights: {"regular expression": {"bits": 8}}, first match wins',
    "min_elements": "leave weights with fewer elements (default: 16384)",
    "on_unsupported": "keep: leave a weight that cannot be quantized, with its reason; error: stop",
    "weight_updates": "detect: pack again what was changed in place; ignore: only new tensors",
    "autotune": "GPU kernels. off: as measured before or modeled; fast, max: measure some, or all",
    "debug_dir": "directory for the graph before and after each pass",
    "inner_backend": "torch.compile backend for the rewritten graph (default: inductor)",
    "inductor": "config patches for Inductor, as a JSON object",
    "mode": "Inductor's mode, such as max-autotune",
}


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each option of FineQuantConfig: `--bits 8`, `--exclude '["lm_head"]'`."""
    group = parser.add_argument_group("FineQuant options", "values as JSON or plain words")
    for option in fields(FineQuantConfig):
        flags = {f"--{option.name}", f"--{option.name.replace('_', '-')}"}
        group.add_argument(
            *sorted(flags), dest=option.name, metavar="VALUE", type=_value,
            default=argparse.SUPPRESS, help=_HELP[option.name],
        )  # fmt: skip


def given_options(arguments: argparse.Namespace) -> dict[str, object]:
    """The options that were given, for `FineQuantConfig.from_options`."""
    names = [option.name for option in fields(FineQuantConfig)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _value(text: str) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value


def group_size(text: str) -> int | str:
    """A group's size along K, or "column"."""
    if text == "column" or (text.isdecimal() and int(text) > 0):
        return text if text == "column" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a size of at least 1 nor 'column'")


def counts(text: str) -> list[int]:
    """Whole numbers from 1 up, with commas between."""
    parts = text.split(",")
    if all(part.isdecimal() and int(part) > 0 for part in parts):
        return [int(part) for part in parts]
    raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 1 up, such as 1,16,64")
