"""transformers: `from_pretrained` quantizes and opens, `save_pretrained` writes packed weights.

Importing this module registers the quant_method "finequant".

    from_pretrained(a dense checkpoint)   each weight is quantized as soon as it is read
    save_pretrained                       codes and scales, under the names of the model
    from_pretrained(a packed one)         of `save_pretrained` or `fqcompile.save`

The files are those of `checkpoint`, whose `packed_record` says how a packed weight lies in one.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fqcompile.checkpoint.conversion import target_types
from fqcompile.checkpoint.packed_record import METHOD, PackedRecord
from fqcompile.config import packing_config
from fqcompile.errors import CheckpointError, FineQuantError, OptionError, UnquantizableWeight
from fqcompile.hf_compat import ignore_unexpected, loading, save_by_own_names, untie
from fqcompile.integrations import in_files, packed_files, refuse_offloading
from fqcompile.modules.quantize import packed_of, restore, site_of
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.options import regexes
from fqcompile.report import Plan, Site
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.parameter import PackedWeight

_FIRST = "fqcompile.quantize_ does so with a loaded model, and fqcompile.save writes the result"
_NEW = "no tensor of the checkpoint is its value, which is new"
_CODES, _SCALE = "codes", "scale"  # the keys under which `_Unpacking` collects tensors


@register_quantization_config(METHOD)
class FineQuantHfConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` for `from_pretrained`: quantize while loading.

    Args:
        modules_to_not_convert: modules that stay dense, by name as in transformers: the beginning
            of it, the end of it, or a regular expression for the beginning.
        options: those of `fqcompile.quantize_`. Weights are quantized when they are read, before
            anything can run, so `calibration` can only be None.

    Raises:
        OptionError: an option is unknown, or its value is not allowed.
    """

    def __init__(
        self, *, modules_to_not_convert: Sequence[str] | None = None, **options: Any
    ) -> None:
        method, kept = options.pop("quant_method", METHOD), modules_to_not_convert or []
        if method != METHOD:
            raise OptionError(f"quant_method is {method!r}; allowed here: {METHOD.value!r}")
        for name in ("calibration", "method"):
            if (value := options.pop(name, None)) is not None:
                raise OptionError(
                    f"{name} is {value!r:.40}, and from_pretrained rounds weights when they are "
                    f"read, before a model could run: leave it out; {_FIRST}"
                )
        if isinstance(kept, str) or not all(isinstance(name, str) for name in kept):
            raise OptionError(f"modules_to_not_convert is {kept!r}; allowed: a list of names")
        given = packing_config(options, calibrates=False)
        patterns = [_of_parameters(name) for name in regexes("modules_to_not_convert", list(kept))]
        self.quant_method, self.modules_to_not_convert = METHOD, list(kept)
        self.options = {name: given.as_dict()[name] for name in options}
        self.config = replace(given, exclude=(*given.exclude, *patterns))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Of `config.json`, or of a dict in place of a config.

        Raises:
            OptionError: as for the class.
        """
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except OptionError as error:
            raise OptionError(
                f"quantization_config: {error}; if a later fqcompile wrote it, install that"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: the options that were given."""
        kept = self.modules_to_not_convert
        modules = {"modules_to_not_convert": kept} if kept else {}
        return {**self.options, **modules, "quant_method": METHOD}


def _of_parameters(module: str) -> str:
    """The pattern of `exclude` for a name of `modules_to_not_convert`."""
    return rf"^(?:{module})(?:(?<=\.)|(?=\.|$))|{re.escape(module)}\.[^.]+$"


def _by_name_of(found: ModuleWeight, site: Site) -> Site:
    """The row of a weight that may have been read by another of its names."""
    recipe: Any = site.recipe
    own = recipe and replace(recipe, names=(found.name,), of_tables=found.of_tables)
    return replace(site, name=found.name, kind=found.kind, recipe=own)


class _Operation(loading().ConversionOps):  # type: ignore[misc]
    """A function of all tensors of one step, whose types transformers then leaves alone."""

    def __init__(self, hf_quantizer: object, run: Callable[..., dict[str, Any]]) -> None:
        self.hf_quantizer, self._run = hf_quantizer, run

    def convert(self, input_dict: dict[str, Any], **about: Any) -> dict[str, Any]:
        """Called by `from_pretrained`."""
        return self._run(input_dict, **about)

    def __deepcopy__(self, memo: object) -> Self:
        return self


class _Unpacking(loading().WeightConverter):  # type: ignore[misc]
    """The step from two tensors to a packed weight, found by the names that its record has."""

    def __init__(self, records: Mapping[str, PackedRecord], operation: _Operation) -> None:
        super().__init__([_CODES, _SCALE], [""], [operation])
        self._parts = {
            tensor: (name, key)
            for name, record in records.items()
            for tensor, key in ((record.codes, _CODES), (record.scale, _SCALE))
        }

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The weight that a tensor is part of, and which part."""
        return self._parts.get(source_key, (source_key, None))

    def __deepcopy__(self, memo: object) -> Self:
        """Made for every tensor; those of the first tensor of each weight are used."""
        made = copy.copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made


@register_quantizer(METHOD)
class FineQuantHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained` and `save_pretrained` ask, of one model.

    Attributes:
        plan: what was made of each weight while loading; None if they were packed already.
    """

    is_trainable = True  # adapters on top of it
    is_compileable = True

    def __init__(self, quantization_config: FineQuantHfConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        self._config = quantization_config.config
        # What raises in a step is only logged by transformers.
        self._keeping = replace(self._config, on_unsupported="keep")
        self._waiting: dict[str, ModuleWeight] = {}
        self._sites: dict[str, Site] = {}
        self._missing: set[str] = set()
        self._records: dict[str, PackedRecord] = {}
        self._steps: list[Any] = []

    def is_serializable(self) -> bool:
        """`save_pretrained` is allowed."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse to offload; see `refuse_offloading`."""
        refuse_offloading(device_map)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes, for `device_map="auto"`."""
        record, found = self._records.get(param_name), self._waiting.get(param_name)
        if record is not None:
            return record.bits / 8 + 2 / record.group_size
        if found is not None:
            options = self._config.site_options(found.name, head=found.head)
            return options.bits / 8 + 2 / options.min_group_size
        return param.element_size()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise FineQuantError(
                "tp_plan or distributed_config is given together with quantization_config: load "
                "the dense model by tp_plan, and call fqcompile.quantize_(model) on all ranks"
            )
        if self.pre_quantized:
            self._read_records(model, checkpoint_files or ())
        else:
            found = module_weights(model, self._config)
            self._waiting = {w.name: w for w in found if w.reason is None and not w.tied}

    def _read_records(self, model: Any, files: Sequence[str]) -> None:
        """Find what is packed in the files, by its name in the model."""
        tensors, records = packed_files(files)
        known, prefix = model.state_dict(), f"{model.base_model_prefix}."
        for name, record in records.items():
            names = (name, prefix + name, name.removeprefix(prefix))
            own = next((own for own in names if own in known), None)
            if own is not None and record.shape != known[own].shape:
                raise CheckpointError(
                    f"{own} is {list(record.shape)} in {Path(files[0]).parent} and "
                    f"{list(known[own].shape)} in the model; is config.json that of another model?"
                )
            if own is not None:
                self._records[own] = record
        ties = model.all_tied_weights_keys
        for name in [n for n in ties if n in self._records and ties[n] in tensors]:
            del ties[name]  # a head of 8 bits beside the table that it was made of
        ignore_unexpected(model, (name for name, _ in model.named_buffers() if name not in known))
        run = partial(self._unpack, target_types(model, model.dtype))
        self._steps = [_Unpacking(self._records, _Operation(self, run))]

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Files with packed weights have the names of the model: nothing else is converted."""
        return self._steps if self.pre_quantized else weight_conversions

    def _unpack(
        self,
        type_of: Callable[[str], torch.dtype],
        tensors: dict[str, list[Tensor]],
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, nn.Parameter]:
        (codes,), (scale,) = tensors[_CODES], tensors[_SCALE]
        weight = QuantizedTensor.of_rows(codes, scale, self._records[full_layer_name].format)
        packed = PackedWeight.of(weight, type_of(full_layer_name), full_layer_name)
        return {full_layer_name: nn.Parameter(packed, requires_grad=False)}

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether `get_quantize_ops` is for it."""
        return param_name in self._waiting

    def get_quantize_ops(self) -> Any:
        """The operation that quantizes what was read."""
        return _Operation(self, self._quantize)

    def _quantize(self, values: dict[str, Any], missing_keys: set[str], **_: Any) -> dict[str, Any]:
        self._missing = missing_keys  # what is read is taken from it
        result = {}
        for name, value in values.items():
            tensor = value[0] if isinstance(value, list) else value
            found = self._waiting.get(name)
            if found is not None and tensor.shape != found.parameter.shape:
                self._sites[name] = replace(site_of(found), reason=_NEW)
                del self._waiting[name]  # so that transformers reports it
            elif found is not None:
                own = replace(found, parameter=tensor)
                self._sites[name], packed = packed_of(own, self._keeping)
                tensor = tensor if packed is None else nn.Parameter(packed, requires_grad=False)
            result[name] = tensor
        return result

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if not self.pre_quantized:
            self.plan = Plan(tuple(self._finish(model)), self._config.as_dict())
        save_by_own_names(model)
        untie(model)
        self._waiting, self._sites, self._missing, self._records = {}, {}, set(), {}
        self._steps.clear()  # transformers would load an adapter with this very list
        return model

    def _finish(self, model: Any) -> list[Site]:
        """Pack heads that share a table, which has been read, by its own name; the plan's rows."""
        rows = []
        named = dict(model.named_parameters(remove_duplicate=False))
        read = {named[name]: site for name, site in self._sites.items()}
        for found in module_weights(model, self._config):
            site = read.get(found.parameter)
            if site is None:
                new = found.reason is None and found.name in self._missing
                own = replace(found, reason=_NEW) if new else found
                site, packed = packed_of(own, self._config)
                if packed is not None:
                    found.put(packed)
            elif site.status == "kept" and self._config.on_unsupported == "error":
                raise UnquantizableWeight(f"{site.name}: {site.reason}")
            rows.append(_by_name_of(found, site))
        return rows

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Codes and scales in the plain layout, in place of packed weights, and their records."""
        return in_files(model.state_dict(), model)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        save_by_own_names(model, own=False)
        dense = restore(model)
        # By default the model's own, and `to` would cast buffers that are kept in fp32.
        return dense if dtype in (None, model.dtype) else dense.to(dtype)
