"""What is asked of transformers, which is an extra: models without values, and their configs."""

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fqcompile.errors import CheckpointError


def transformers() -> Any:
    """The package.

    Raises:
        CheckpointError: it is not installed.
    """
    if find_spec("transformers") is None:
        raise CheckpointError(
            "transformers is not installed, which knows this model's class; run: pip install "
            "'fqcompile[demo]', or give fqcompile.load a function that builds the model"
        )
    return import_module("transformers")


def model_class(name: object, directory: Path) -> Any:
    """A class of transformers by its name.

    Raises:
        CheckpointError: there is none.
    """
    found = getattr(transformers(), name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not hasattr(found, "_from_config"):
        raise CheckpointError(
            f"{directory} holds a {name}, which is no model class of this transformers; give a "
            "function that builds the model"
        )
    return found


def model_from_config(name: object, config: object, directory: Path) -> Any:
    """A model of that class under the caller's default device.

    Raises:
        CheckpointError: the class or the config is not known here.
    """
    found = model_class(name, directory)
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"{directory} has no config of Hugging Face; give a function that builds the model"
        )
    return build_model(found, found.config_class.from_dict(dict(config)))


def build_model(found: Any, config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model as `from_pretrained` starts: some constructors compute on the CPU nevertheless."""
    with import_module("transformers.initialization").meta_device_safe_creation_ops():
        return found._from_config(config, **({} if dtype is None else {"dtype": dtype}))


def generation_config(path: Path) -> Any:
    """From a file, whatever its name."""
    return transformers().GenerationConfig.from_pretrained(
        path.parent, config_file_name=path.name, local_files_only=True
    )


def hugging_face_files(model: Any) -> dict[str, bytes]:
    """The model's configs, as `save_pretrained` would write them; none for another model."""
    files = {}
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        content = json.loads(config.to_json_string())
        content["architectures"] = [type(model).__name__]
        files["config.json"] = _text(content)
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        files["generation_config.json"] = _text(json.loads(generation.to_json_string()))
    return files


def config_of(files: Mapping[str, bytes]) -> Any:
    """The content of `config.json` among them, or None."""
    return json.loads(files["config.json"]) if "config.json" in files else None


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
