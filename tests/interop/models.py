"""Quantized models in every scheme that an export has to bring together, and their oracles."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file
from torch import Tensor

import fqcompile
from tests.dense_models import build as build_dense
from tests.moe_models import MODELS as MOE_MODELS
from tests.moe_models import build as build_moe

# Within a fused layer, a stack and a model everything differs; 16 does not fit any engine.
UNEVEN: dict[str, Any] = {
    r"0.*(q_proj|gate_proj)": {"granularity": "column"},
    r"0.*(k_proj|query)": {"granularity": 64},
    r"0.*(up_proj|v_proj)": {"bits": 8, "granularity": 32},
    r"1.*down_proj": {"bits": 8, "granularity": "column"},
}
# Engines have uniform levels alone.
OPTIONS: dict[str, Any] = {"min_elements": 1024, "levels": "uniform", "overrides": UNEVEN}


def make(name: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A model as `from_pretrained` loads it, and inputs."""
    if name in MOE_MODELS:
        model: Any = build_moe(name, dtype, "grouped_mm")
        inputs = {"input_ids": torch.randint(1, 100, (2, 5))}
    else:
        model, inputs = build_dense(name, dtype)
    model.save_pretrained(directory, max_shard_size="200KB")
    return type(model).from_pretrained(directory).eval(), inputs


def save_quantized(model: Any, directory: Path, **options: Any) -> Any:
    """Quantized into the directory; returns a copy with the dequantized values instead."""
    oracle = copy.deepcopy(model)
    plan = fqcompile.quantize_(model, **{**OPTIONS, **options})
    fqcompile.save(model, directory, plan=plan)
    return fqcompile.fake_quantize_(oracle, plan)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All of a checkpoint, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def library_dense(directory: Path) -> dict[str, Tensor]:
    """A compressed-tensors checkpoint, decompressed layer by layer by the library that wrote it."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    config.pop("quant_method")
    parsed = QuantizationConfig.model_validate(config)
    tensors = tensors_of(directory)
    modules = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
    parts = {m: {n.rpartition(".")[2]: tensors[n] for n in _parts(m, tensors)} for m in modules}
    dense = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in parts}
    for module, own in parts.items():
        biases = {f"{module}.{part}": own.pop(part) for part in list(own) if part == "bias"}
        schemes = [
            scheme
            for scheme in parsed.config_groups.values()
            if any(t == "Linear" or match_name(module, t) for t in scheme.targets)
        ]
        assert len(schemes) == 1, f"{module} matches {len(schemes)} groups"
        assert not any(match_name(module, pattern) for pattern in parsed.ignore), module
        compressor = BaseCompressor.get_value_from_registry(parsed.format)
        dense[f"{module}.weight"] = compressor.decompress(own, schemes[0])["weight"]
        dense |= biases
    return dense


def _parts(module: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.rpartition(".")[0] == module]


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit, and by the same names."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())[:6]
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
