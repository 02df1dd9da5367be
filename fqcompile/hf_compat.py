"""Every name of transformers without a promise that this package builds on; no other file uses one.

All were seen to work in transformers 5.17.0, 5.23.0 and 5.24.0; `tests/test_hf_compat.py` tries
each. transformers is an extra, so it is imported when one of them is asked for.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def loading() -> Any:
    """The module of WeightConverter, WeightRenaming, their operations, and `rename_source_key`."""
    return import_module("transformers.core_model_loading")


def conversion_mapping(model: Any, **options: Any) -> list[Any]:
    """How the checkpoint's tensors become the model's, as converters and renamings."""
    module = import_module("transformers.conversion_mapping")
    return list(module.get_model_conversion_mapping(model, **options))


def renamed(name: str, renamings: Iterable[Any]) -> str:
    """A tensor's name after all that match it, in their order."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return str(name)


def converted_name(name: str, converters: Iterable[Any]) -> tuple[str, str | None]:
    """A tensor's name after the first converter that matches it, and the pattern that did."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target, pattern
    return name, None


def meta_safe() -> AbstractContextManager[object]:
    """In which constructors that compute on the CPU run on the meta device too."""
    context: AbstractContextManager[object]
    context = import_module("transformers.initialization").meta_device_safe_creation_ops()
    return context


def is_model_class(value: object) -> bool:
    """Whether a config makes a model of it."""
    return isinstance(value, type) and hasattr(value, "_from_config")


def model_from_config(model_class: Any, config: Mapping[str, Any], **options: Any) -> Any:
    """A model from the content of a `config.json`, in which infinities are written as objects."""
    own = model_class.config_class
    return model_class._from_config(own.from_dict(own._decode_special_floats(config)), **options)


def kept_types(model: Any, dtype: torch.dtype) -> list[str]:
    """Patterns of the names of what a model of this type keeps in fp32."""
    return list(model._get_dtype_plan(dtype))


def ignored_names(model: Any) -> tuple[Iterable[str] | None, Iterable[str] | None]:
    """Patterns of what may be missing in a checkpoint, and of what may be there for nothing."""
    return model._keys_to_ignore_on_load_missing, model._keys_to_ignore_on_load_unexpected


def move_missing(model: Any, names: set[str]) -> None:
    """Give those on the meta device memory, so that they can be initialized."""
    model._move_missing_keys_from_meta_to_device(names, None, None, None)


def mark_initialized(tensor: Tensor) -> None:
    """Have `initialize_missing` leave it as it is."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def initialize_missing(model: Any) -> None:
    """Compute what is not marked, by the model's own rules."""
    model._initialize_missing_keys(False)


def can_switch_experts(model_class: Any) -> bool | None:
    """Whether `set_experts_implementation` works for a class; None if it is not a model class."""
    ask = getattr(model_class, "_can_set_experts_implementation", None)
    return None if ask is None else bool(ask())


def ignore_unexpected(model: Any, names: Iterable[str]) -> None:
    """Have `from_pretrained` say nothing of these in a file."""
    patterns = {rf"(^|\.){re.escape(name)}$" for name in names}
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *patterns,
    }


def save_by_own_names(model: Any, own: bool = True) -> None:
    """Have `save_pretrained` write the model's tensors as they are there; or as for any model."""
    model._weight_conversions = [] if own else None


def rules_of_ties(model: Any) -> Mapping[str, str]:
    """The names that `from_pretrained` gives the parameter of another name, and that name."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def untied_names(model: Any, named: Iterable[tuple[str, object]]) -> set[str]:
    """Further names of shared parameters that the rules of the class do not tie: `from_pretrained`
    looks for each in the files."""
    ties, names = rules_of_ties(model), dict[int, set[str]]()
    found = set()
    for name, parameter in named:
        owners = names.setdefault(id(parameter), set())
        if owners and ties.get(name, name) not in owners:
            found.add(name)
        owners.add(ties.get(name, name))
    return found


def untie(model: nn.Module) -> None:
    """Have `tie_weights` leave apart what is apart now, as a packed head and its dense table.

    `tie_weights` is called by `resize_token_embeddings`, evaluation harnesses and others, and goes
    by rules of the class, and of the class of each model inside. The instance gets its own rules.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            held = dict(module.named_parameters(remove_duplicate=False))
            module.all_tied_weights_keys = _together(module.all_tied_weights_keys, held)
            own = module.get_expanded_tied_weights_keys(all_submodels=False)
            if own != (together := _together(own, held)):
                module._tied_weights_keys = together


def _together(ties: Mapping[str, str], held: Mapping[str, Tensor]) -> dict[str, str]:
    """Those whose two names are of one parameter, or not of parameters."""
    return {
        name: other
        for name, other in ties.items()
        if name not in held or other not in held or held[name] is held[other]
    }
