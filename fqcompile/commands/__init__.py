"""The subcommands of `fqcompile`: each module has `add_arguments(parser)` and `run(arguments)`.

Here is what they share: argument types, FineQuant's options, and models given by name. Options have
the same names as in the Python API; values are JSON or plain words. A model is a local Hugging Face
checkpoint, or a function that returns one.
"""

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fqcompile.checkpoint.source import read_config
from fqcompile.config import OF_COMPILING
from fqcompile.errors import CheckpointError, FineQuantError, nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The `--help` text of each option.
_HELP = {
    "bits": "bits of a quantized weight: 4 or 8 (default: 4)",
    "levels": "4 bits: 16 levels that fit a normal distribution (default: normal), or uniform ones",
    "granularity": "group size along K, or the rule that chooses it: adaptive, range, column",
    "alpha": "range: finer groups while the mean range shrinks below this factor (default: 0.9)",
    "min_group_size": "smallest group size that a rule may choose (default: 32)",
    "error_budget": "largest relative error of a matrix: finer groups, then 8 bits, until met",
    "scale_method": "mse: search the scale of each group; absmax: the largest weight decides",
    "include": "quantize only weights whose names match one of these regular expressions",
    "exclude": "leave weights whose names match one of these regular expressions",
    "overrides": 'options for some weights: {"regular expression": {"bits": 8}}, first match wins',
    "quantize_embeddings": "8: pack tables of embeddings too (default: null, they stay)",
    "min_elements": "leave weights with fewer elements (default: 16384)",
    "on_unsupported": "keep: leave a weight that cannot be quantized, with its reason; error: stop",
    "weight_updates": "detect: pack again what was changed in place; ignore: only new tensors",
    "fuse_attention": "true: decode on a CPU by our attention kernel; false: PyTorch's",
    "autotune": "GPU kernels. off: as measured before or modeled; fast, max: measure some, or all",
    "calibration": "what is run to weigh errors: synthetic, random token ids; first_call; null",
    "debug_dir": "directory for the graph before and after each pass",
    "inner_backend": "torch.compile backend for the rewritten graph (default: inductor)",
    "inductor": "config patches for Inductor, as a JSON object",
    "mode": "Inductor's mode, such as max-autotune",
}

# Of commands that quantize a checkpoint, which need not run its model without.
_DATA_HELP = {
    "calibration": "text file, or synthetic (random tokens), that the model runs on to weigh "
    "errors (default: null, not at all)",
    "method": "scale: round to best scales; gptq: make up for errors, with a calibration text of "
    "thousands of tokens (default: scale)",
}

_EXAMPLE_TOKENS = 8


def add_option_flags(parser: argparse.ArgumentParser, *, compiles: bool) -> None:
    """One flag for each option of FineQuantConfig: `--bits 8`, `--exclude lm_head`.

    A command that only packs weights hides the options of compiling, and refuses them by its rules;
    it has the method of packing too.
    """
    group = parser.add_argument_group("FineQuant options", "values as JSON or plain words")
    helps = _HELP if compiles else _HELP | _DATA_HELP | dict.fromkeys(OF_COMPILING)
    for name, text in helps.items():
        flags = {f"--{name}", f"--{name.replace('_', '-')}"}
        group.add_argument(
            *sorted(flags), dest=name, metavar="VALUE", type=_reader(name),
            default=argparse.SUPPRESS, help=text or argparse.SUPPRESS,
        )  # fmt: skip


def given_options(arguments: argparse.Namespace) -> dict[str, object]:
    """The options given on the command line, for `FineQuantConfig.from_options`."""
    return {name: value for name, value in vars(arguments).items() if name in _HELP | _DATA_HELP}


def _reader(name: str) -> Callable[[str], object]:
    """Of an option that is a list, one word is a list of one."""

    def patterns(text: str) -> object:
        value = _value(text)
        return [value] if isinstance(value, str) else value

    return patterns if name in ("include", "exclude") else _value


def _value(text: str) -> object:
    """JSON, what Python writes in its place (None, .5, ['a']: messages show that), or a word."""
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    return value


def group_size(text: str) -> int | str:
    """A group size along K, or "column" for per-channel scales."""
    if text == "column" or (text.isdecimal() and int(text) > 0):
        return text if text == "column" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a size of at least 1 nor 'column'")


def count(text: str) -> int:
    """An integer >= 1."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")


def counts(text: str) -> list[int]:
    """Comma-separated integers >= 1."""
    parts = text.split(",")
    if all(part.isdecimal() and int(part) > 0 for part in parts):
        return [int(part) for part in parts]
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1 up, e.g. 1,16,64")


def require(*packages: str) -> None:
    """Raise an error that names the extra if a package of the demo is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise FineQuantError(
            f"{', '.join(missing)} not installed; run: pip install 'fqcompile[demo]'"
        )


def load_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model in eval mode, and example inputs for it.

    Args:
        name: a directory with a Hugging Face checkpoint, or "module:function" of a module in the
            working directory or installed, where the function returns (model, example inputs).

    Raises:
        FineQuantError: `name` is neither, or the function returns something else.
        CheckpointError: transformers cannot load what is in the directory.
    """
    if Path(name).is_dir():
        return _load_checkpoint(Path(name), dtype)
    make = _function(name)
    made = make()
    match made:
        case (nn.Module() as model, (tuple() | list()) as inputs):
            return model.eval(), tuple(inputs)
    kinds = [type(part).__name__ for part in (made if isinstance(made, tuple) else (made,))]
    raise FineQuantError(
        f"{name} returned {', '.join(kinds)}; it must return a model and a tuple of its inputs, "
        "such as: return model, (x,)"
    )


def _function(name: str) -> Callable[[], object]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    # Only `python -m` looks there by itself; last, so that no file of a user's hides a package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if not function or not _is_importable(module):
        raise FineQuantError(
            f"{name!r} is neither a directory with a checkpoint nor 'module:function' of a module "
            "that can be imported"
        )
    names = vars(import_module(module))
    found = names.get(function)
    if not callable(found):
        hint = nearest(function, [known for known, value in names.items() if callable(value)])
        raise FineQuantError(f"{name!r}: {module} has no function {function!r}{hint}")
    return cast(Callable[[], object], found)


def _is_importable(module: str) -> bool:
    """Whether there is such a module; of a missing package, `find_spec` raises."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    packages = (".".join(parts[:end]) for end in range(1, len(parts)))
    specs = (find_spec(package) for package in packages)
    inside = all(spec is not None and spec.submodule_search_locations is not None for spec in specs)
    return inside and find_spec(module) is not None


def _load_checkpoint(directory: Path, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    require("transformers")
    read_config(directory)
    transformers = import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        generative = any("LM" in name for name in config.architectures or ())
        auto = transformers.AutoModelForCausalLM if generative else transformers.AutoModel
        model: nn.Module = auto.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:  # files that are missing, an architecture it lacks
        raise CheckpointError(f"transformers does not load {directory}: {error}") from error
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise FineQuantError(
            f"{directory} holds a {type(model).__name__}, which reads no tokens; give "
            "'module:function' where the function returns the model and its inputs"
        )
    tokens = torch.arange(_EXAMPLE_TOKENS).remainder(vocabulary)
    return model.eval(), (tokens[None],)
