"""Models for the command line: a local Hugging Face checkpoint, or a function that makes one."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fqcompile.errors import FineQuantError

_EXAMPLE_TOKENS = 8


def require(*packages: str) -> None:
    """Raise, naming the extra, where a package of the demo is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise FineQuantError(
            f"{', '.join(missing)} not installed; run: pip install 'fqcompile[demo]'"
        )


def load_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model in eval mode, and example inputs for it.

    Args:
        name: a directory with a Hugging Face checkpoint, or "module:function" where the function
            returns (model, example inputs).

    Raises:
        FineQuantError: `name` is neither.
    """
    if Path(name).is_dir():
        return _load_checkpoint(Path(name), dtype)
    module, _, function = name.partition(":")
    if not function or find_spec(module) is None:
        raise FineQuantError(
            f"{name!r} is neither a directory with a checkpoint nor 'module:function' of a module "
            "that can be imported"
        )
    model, inputs = getattr(import_module(module), function)()
    return model.eval(), tuple(inputs)


def _load_checkpoint(directory: Path, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    require("transformers")
    transformers = import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    generative = any("LM" in name for name in config.architectures or ())
    auto = transformers.AutoModelForCausalLM if generative else transformers.AutoModel
    model: nn.Module = auto.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()
    tokens = torch.arange(_EXAMPLE_TOKENS).remainder(config.vocab_size)
    return model, (tokens[None],)
