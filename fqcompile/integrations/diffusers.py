"""diffusers: `from_pretrained` quantizes and opens, `save_pretrained` writes packed weights.

Importing this module registers the quant_method "finequant" with diffusers, for models and for
components of pipelines. The files are those that `integrations.transformers` writes and reads.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, device, nn

from fqcompile.checkpoint.packed_record import METHOD, PackedRecord
from fqcompile.errors import FineQuantError
from fqcompile.files.safetensors_file import DTYPES
from fqcompile.integrations import in_files, packed_files, refuse_offloading
from fqcompile.integrations.transformers import FineQuantHfConfig
from fqcompile.modules.quantize import packed_of, restore, site_of
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.report import Plan, Site
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.parameter import PackedWeight

_FP32 = "diffusers keeps its module in float32, for which the model's class names it"
_TABLE = (
    "an embedding shares it, and keeps it: call fqcompile.quantize_ on the loaded model for a "
    "packed copy"
)
_NEW = "no tensor of the checkpoint is its value, which is new"


class FineQuantDiffusersConfig(FineQuantHfConfig):
    """`quantization_config` for `from_pretrained` of a model, with the arguments of its base.

    For the components of a pipeline, `PipelineQuantizationConfig(quant_backend="finequant", ...)`
    makes this one for those of diffusers, and `FineQuantHfConfig` for those of transformers.
    """


class FineQuantDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """What `from_pretrained` and `save_pretrained` ask, of one model.

    Attributes:
        plan: what was made of each weight while loading; None if they were packed already.
    """

    is_serializable = True
    is_trainable = True  # adapters on top of it
    use_keep_in_fp32_modules = True
    # Codes and scales of a weight may lie in two files.
    supports_parallel_loading = False

    def __init__(self, quantization_config: FineQuantDiffusersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        self._config = quantization_config.config
        self._found: dict[str, ModuleWeight] = {}
        self._sites: dict[str, Site] = {}
        self._records: dict[str, PackedRecord] = {}
        self._parts: dict[str, str] = {}  # tensors in the files -> the weight
        self._read: dict[str, Tensor] = {}  # of weights of which the other tensor is to come

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse to offload.

        Raises:
            FineQuantError: a part is to lie on the disk, or on the CPU beside an accelerator.
        """
        refuse_offloading(device_map)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """The names of weights in place of those of their codes and scales.

        Raises:
            CheckpointError: the files are damaged, or hold no packed weight.
        """
        if not self.pre_quantized:
            return loaded_keys
        _, self._records = packed_files([str(file) for file in checkpoint_files])
        for name, record in self._records.items():
            self._parts |= {record.codes: name, record.scale: name}
        return [*(key for key in loaded_keys if key not in self._parts), *self._records]

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, and the packed weights whose tensors have been read by now."""
        result = {}
        for key, tensor in state_dict.items():
            name = self._parts.get(key)
            if name is None:
                result[key] = tensor
                continue
            self._read[key] = tensor
            record = self._records[name]
            if {record.codes, record.scale} <= self._read.keys():
                codes, scale = self._read.pop(record.codes), self._read.pop(record.scale)
                weight = QuantizedTensor.of_rows(codes, scale, record.format)
                result[name] = PackedWeight.of(weight, DTYPES[record.dtype], name)
        return result

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Sequence[str] = (), **_: Any
    ) -> None:
        if self.pre_quantized:
            return
        for found in module_weights(model, self._config):
            kept = not set(found.name.split(".")).isdisjoint(keep_in_fp32_modules)
            self._found[found.name] = replace(found, reason=_FP32) if kept else found

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, *_: Any, **__: Any
    ) -> bool:
        """Whether `create_quantized_param` is for it."""
        found = self._found.get(param_name)
        waits = found is not None and found.reason is None and not found.tied
        return waits or isinstance(param_value, PackedWeight)

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: device | str | int,
        *others: Any,
        **named: Any,
    ) -> None:
        """Quantize a weight on its device, if it is not packed yet, and put it into the model.

        Raises:
            UnquantizableWeight: it has to stay, and `on_unsupported="error"`.
        """
        path, _, attribute = param_name.rpartition(".")
        value, trains = param_value.to(target_device), False
        if not isinstance(value, PackedWeight):
            found = replace(self._found[param_name], parameter=value)
            self._sites[param_name], packed = packed_of(found, self._config)
            value, trains = (value, True) if packed is None else (packed, False)
        module = model.get_submodule(path)
        module._parameters[attribute] = nn.Parameter(value, requires_grad=trains)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if not self.pre_quantized:
            rows = tuple(self._sites.get(w.name) or _left(w) for w in self._found.values())
            self.plan = Plan(rows, self._config.as_dict())
        self._found, self._sites, self._records, self._parts = {}, {}, {}, {}
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Codes and scales in the plain layout, in place of packed weights, and their records.

        Raises:
            FineQuantError: they are to be written as pickles, which have no place for records.
        """
        if not safe_serialization:
            raise FineQuantError(
                "save_pretrained has safe_serialization=False, and packed weights are written to "
                "safetensors files: leave it out"
            )
        return in_files(state_dict)

    def _dequantize(self, model: Any) -> Any:
        # A config is frozen, and diffusers has no way to take a key from it.
        OrderedDict.__delitem__(model.config, "quantization_config")
        return restore(model)


def _left(found: ModuleWeight) -> Site:
    return replace(site_of(found), reason=found.reason or (_TABLE if found.tied else _NEW))


def let_save(model: ModelMixin) -> None:
    """Let `save_pretrained` write a model that `fqcompile.quantize_` has quantized.

    A model that `from_pretrained` quantized or opened needs no such call.

    Raises:
        FineQuantError: it is no model of diffusers, or has no packed weight.
    """
    if not isinstance(model, ModelMixin):
        raise FineQuantError(
            f"let_save got a {type(model).__name__}, which is no model of diffusers: give a "
            "component of a pipeline, such as pipe.transformer; fqcompile.save writes others"
        )
    if not any(isinstance(parameter, PackedWeight) for parameter in model.parameters()):
        raise FineQuantError(
            f"{type(model).__name__} has no packed weight: call fqcompile.quantize_(model) first"
        )
    config = FineQuantDiffusersConfig()
    model.hf_quantizer = FineQuantDiffusersQuantizer(config)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.register_to_config(quantization_config=config)


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FineQuantDiffusersConfig
AUTO_QUANTIZER_MAPPING[METHOD] = FineQuantDiffusersQuantizer
