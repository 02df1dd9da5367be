"""FineQuant's options as command-line flags: the same names, values as JSON or plain words."""

import argparse
import json
from dataclasses import fields

from fqcompile.config import FineQuantConfig


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each option of FineQuantConfig: `--bits 8`, `--exclude '["lm_head"]'`."""
    group = parser.add_argument_group(
        "FineQuant options", "values as JSON or plain words; `README.md` explains each"
    )
    for option in fields(FineQuantConfig):
        flags = {f"--{option.name}", f"--{option.name.replace('_', '-')}"}
        group.add_argument(*sorted(flags), dest=option.name, type=_value, default=argparse.SUPPRESS)


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
