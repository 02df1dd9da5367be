"""All use of transformers (an optional dependency): models on the meta device, and their configs.

A model on the meta device has no values, except those that its constructor computes on the CPU,
such as rotary frequencies. Their size depends on the config alone, which is untrusted input, so it
is bounded before memory is allocated, as are the numbers of layers and modules.
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from fqcompile.checkpoint.packed_record import METHOD
from fqcompile.config import OF_COMPILING
from fqcompile.errors import CheckpointError
from fqcompile.files.untrusted import read_json, shown
from fqcompile.hf_compat import is_model_class, meta_safe, model_from_config
from fqcompile.quant.checks import FLOAT_DTYPES
from fqcompile.tensor.format import NORMAL
from fqcompile.torch_compat import TorchDispatchMode, schema_of, tree_iter, tree_map_only

log = logging.getLogger("fqcompile")

# Implementations inside transformers; it fetches all others, flash attention too, from the hub.
_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
_QUANTIZATION = "quantization_config"
_MOST_LAYERS = 10_000
# Config keys that set the length of a module list; other keys that mention layers do not.
_COUNT = re.compile(r"(?!max_|min_)(?!.*per_)(.+_)?(n_?)?(layers?|blocks|depth)")
_MODULES, _MODULES_PER_TENSOR = 1_000, 20  # far more than models have


def transformers() -> Any:
    """Import transformers.

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
    """A model class of transformers by its name.

    Raises:
        CheckpointError: there is no such class.
    """
    found = getattr(transformers(), name, None) if isinstance(name, str) else None
    if not is_model_class(found):
        raise CheckpointError(
            f"{directory} holds a {shown(name)}, which is not a model class of this transformers; "
            "of such a one, fqcompile.load takes a function that builds the model if it is packed, "
            "and a dense one is opened by from_pretrained(directory, trust_remote_code=True), for "
            "fqcompile.quantize_(model); no command takes it"
        )
    return found


def build_model(
    name: object, config: object, directory: Path, tensors: int, dtype: torch.dtype | None = None
) -> Any:
    """Build a model of that class on the caller's default device, as `from_pretrained` does first.

    Args:
        config: the content of a `config.json`; it can never cause code to be downloaded.
        tensors: number of tensors for the model, which bounds how many layers it may have.

    Raises:
        CheckpointError: the class is unknown, or cannot be built from that config.
    """
    found = model_class(name, directory)
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"{directory} has no config of Hugging Face; fqcompile.load takes a function that "
            "builds the model"
        )
    _check_layers(config, directory)
    try:
        modules = _MODULES + _MODULES_PER_TENSOR * tensors
        with meta_safe(), _at_most(modules, directory), BoundedComputing(directory):
            kind = {} if dtype is None else {"dtype": dtype}
            # transformers 5.17 refuses the name of a class that is in none of its lists.
            own = {**without_code(config), "architectures": [found.__name__]}
            own.pop(_QUANTIZATION, None)  # of weights that are not made here
            return model_from_config(found, own, **kind)
    except CheckpointError:
        raise
    except Exception as error:  # whatever constructors make of values that they do not expect
        raise CheckpointError(
            f"{directory}: {found.__name__} cannot be built from its config: "
            f"{type(error).__name__}: {shown(error)}; is config.json that of another model?"
        ) from error


def model_made_by(function: Callable[[], Any], directory: Path, dtype: torch.dtype) -> Any:
    """The model of a caller's function, as `build_model` builds those of its own.

    Raises:
        CheckpointError: it is no model that transformers could save.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype in FLOAT_DTYPES else before)
    try:
        with meta_safe():
            model = function()
    finally:
        torch.set_default_dtype(before)
    if not is_model_class(type(model)):
        raise CheckpointError(
            f"{directory} holds a model of transformers, and the function made a "
            f"{type(model).__name__}; give one that makes the PreTrainedModel that was saved"
        )
    return model


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without implementations that transformers would download when using it."""
    result = {}
    for key, value in config.items():
        allowed = next((own for name, own in _IMPLEMENTATIONS.items() if name in key), None)
        if allowed is not None and value is not None and value not in allowed:
            log.warning("config.json: %s is %r; it is left at its default", key, shown(value))
            continue
        result[key] = without_code(value) if isinstance(value, Mapping) else value
    return result


def _check_layers(config: Mapping[str, Any], directory: Path) -> None:
    """Bound the layer counts of a config before the constructor builds the layers."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_layers(value, directory)
        elif type(value) is int and value > _MOST_LAYERS and _COUNT.fullmatch(key):
            raise CheckpointError(
                f"{directory}: {shown(key)} is {value} in its config; at most {_MOST_LAYERS} "
                "layers are built"
            )


@contextmanager
def _at_most(modules: int, directory: Path) -> Iterator[None]:
    """Raise, in this thread, if a config creates far more modules than there are tensors."""
    own, numbers = threading.get_ident(), count(1)

    def seen(*_: object) -> None:
        if threading.get_ident() == own and next(numbers) > modules:
            raise CheckpointError(
                f"{directory}: its config asks for more than {modules} modules, and there are far "
                "fewer tensors; is config.json that of another model?"
            )

    hook = register_module_module_registration_hook(seen)
    try:
        yield
    finally:
        hook.remove()


def generation_config(path: Path) -> Any:
    """Read a generation config from a file of any name.

    Raises:
        CheckpointError: it is not a generation config.
    """
    read_json(path)
    try:
        return transformers().GenerationConfig.from_pretrained(
            path.parent, config_file_name=path.name, local_files_only=True
        )
    except Exception as error:  # whatever it makes of values that it does not expect
        raise CheckpointError(
            f"{path} is not a generation config: {type(error).__name__}: {shown(error)}; download "
            "it again, or remove it"
        ) from error


def hugging_face_files(model: Any, options: Mapping[str, Any]) -> dict[str, bytes]:
    """The model's configs, as `save_pretrained` would write them; empty for other models.

    `options`: those it was quantized with, as far as they are known.
    """
    files = {}
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        content = json.loads(config.to_json_string())
        content["architectures"] = [type(model).__name__]
        if isinstance(getattr(model, "dtype", None), torch.dtype):  # else that of its source
            content["dtype"] = str(model.dtype).removeprefix("torch.")
        of_packing = {n: v for n, v in options.items() if n not in (*OF_COMPILING, "calibration")}
        if (of_packing.get("bits"), of_packing.get("levels")) == (8, NORMAL):
            del of_packing["levels"]  # a default that nobody gave: given, it would be refused
        content[_QUANTIZATION] = {**of_packing, "quant_method": METHOD}
        files["config.json"] = _text(content)
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        files["generation_config.json"] = _text(json.loads(generation.to_json_string()))
    return files


def config_of(files: Mapping[str, bytes]) -> Any:
    """The model's own content of `config.json` among them, or None."""
    content = json.loads(files.get("config.json", b"null"))
    return content and {key: value for key, value in content.items() if key != _QUANTIZATION}


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


_MOST = 4 << 30  # bytes, all tensors together: far more than models compute
_UNKNOWN = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class BoundedComputing(TorchDispatchMode):
    """Raise, in this thread, if operators would allocate more than `_MOST` bytes on the CPU.

    Operators with data-dependent result sizes are not counted: they return at most a few times
    the size of their inputs.
    """

    def __init__(self, where: object) -> None:
        """`where` is the directory whose config it is, for errors."""
        super().__init__()
        self.where, self.made = where, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and count its result.

        Raises:
            CheckpointError: the results would be too large.
        """
        kwargs = kwargs or {}
        if _computes(func, args, kwargs):
            self.made += _bytes(func, args, kwargs)
            if self.made > _MOST:
                raise CheckpointError(
                    f"{self.where}: its config asks for {self.made} bytes that no file holds and "
                    f"that the model's class computes; at most {_MOST} are made: is config.json "
                    "that of another model?"
                )
        return func(*args, **kwargs)


def _computes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operator allocates CPU memory of a size that is known in advance."""
    if _UNKNOWN & set(func.tags) or any(r.alias_info for r in schema_of(func).returns):
        return False
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "cpu"
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        return _takes_device(func)
    return any(tensor.device.type == "cpu" for tensor in tensors)


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in schema_of(func).arguments)


def _bytes(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes of the result, computed on the meta device."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    device = {"device": torch.device("meta")} if _takes_device(func) else {}
    found = func(*args, **{**kwargs, **device})
    return sum(leaf.nbytes for leaf in tree_iter(found) if isinstance(leaf, Tensor))
