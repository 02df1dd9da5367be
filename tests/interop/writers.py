"""Checkpoints as others write them: by the library itself, and GPTQ and AWQ by plain loops."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEARS = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight", "fc1.weight", "fc2.weight")


def arguments(bits: int, group_size: int | None, symmetric: bool = True) -> QuantizationArgs:
    strategy = "channel" if group_size is None else "group"
    return QuantizationArgs(
        num_bits=bits, strategy=strategy, group_size=group_size, symmetric=symmetric
    )


def scale_and_zero(w: Tensor, weights: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """From the extremes of each group; zero points as the library has them, signed."""
    groups = w.float().view(w.shape[0], -1, weights.group_size or w.shape[1])
    half = 1 << weights.num_bits - 1
    if weights.symmetric:
        scale = groups.abs().amax(-1) / (half - 1)
        return scale.to(w.dtype), torch.zeros_like(scale, dtype=torch.int8)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (2 * half - 1)).to(w.dtype)
    zero = (-half - (low / scale.float()).round()).clamp(-half, half - 1)
    return scale, zero.to(torch.int8)


def write_by_library(model: Any, weights: QuantizationArgs, directory: Path) -> None:
    """As llm-compressor saves a model: the library compresses its modules and writes the config."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            scale, zero = scale_and_zero(module.weight.data, weights)
            module.weight_scale.data = scale
            if not weights.symmetric:
                module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))


def write_each_layer(
    plain: Path, directory: Path, schemes: Mapping[str, QuantizationArgs]
) -> dict[str, Tensor]:
    """A checkpoint of a model with experts: each layer compressed by the library.

    Args:
        schemes: by a part of names, in order; the first that is in a layer's name.

    Returns:
        The dense tensors of the same checkpoint, decompressed by the library.
    """
    tensors, dense = {}, {}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, tensor in _tensors(plain).items():
        weights = next((w for part, w in schemes.items() if part in name), None)
        if weights is None or not name.endswith(LINEARS):
            tensors[name] = dense[name] = tensor
            continue
        scheme = QuantizationScheme(targets=[], weights=weights)
        scale, zero = scale_and_zero(tensor, weights)
        state = {"weight": tensor, "weight_scale": scale}
        state |= {} if weights.symmetric else {"weight_zero_point": zero}
        packed = compressor.compress(state, scheme)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": value for part, value in packed.items()}
        dense[name] = compressor.decompress(packed, scheme)["weight"]
    groups = {
        f"group_{i}": QuantizationScheme(targets=[f"re:.*{part}.*"], weights=weights)
        for i, (part, weights) in enumerate(schemes.items())
    }
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    write_checkpoint(plain, directory, tensors, config.to_dict())
    return dense


Packer = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


def write_four_bit(
    plain: Path,
    directory: Path,
    packer: Packer,
    quantization: Mapping[str, Any],
    zeros: Callable[[np.random.Generator, tuple[int, int]], np.ndarray],
    group_size: int = 32,
) -> dict[str, Tensor]:
    """GPTQ or AWQ with random codes 0 .. 15 [K, N]; returns the dense tensors that they mean."""
    rng = np.random.default_rng(0)
    tensors, dense = {}, {}
    for name, tensor in _tensors(plain).items():
        if not name.endswith(LINEARS):
            tensors[name] = dense[name] = tensor
            continue
        n, k = tensor.shape
        groups = -(-k // group_size)  # the last may be short
        codes, zero = rng.integers(0, 16, (k, n)), zeros(rng, (groups, n))
        scale = torch.from_numpy(rng.uniform(0.01, 0.02, zero.shape)).to(torch.float16)
        wide = torch.from_numpy(codes - np.repeat(zero, group_size, 0)[:k]).float()
        weight = wide * scale.float().repeat_interleave(group_size, 0)[:k]
        dense[name] = weight.t().to(tensor.dtype)
        module = name.removesuffix(".weight")
        parts = {p: torch.from_numpy(v.copy()) for p, v in packer(codes, zero).items()}
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
        tensors[f"{module}.scales"] = scale
    write_checkpoint(
        plain, directory, tensors, {"bits": 4, "group_size": group_size, **quantization}
    )
    return dense


def gptq_parts(
    codes: np.ndarray, zeros: np.ndarray, less: int = 1, group_size: int = 32
) -> dict[str, np.ndarray]:
    """Codes in words along K, zero points along N and less by one."""
    order = np.arange(len(codes)) // group_size
    return {
        "qweight": words(codes.T, range(8)).T,
        "qzeros": words(zeros - less, range(8)),
        "g_idx": order.astype(np.int32),
    }


def awq_parts(codes: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """Both in words along N, in the order of the kernel named gemm."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(codes, order), "qzeros": words(zeros, order)}


def words(numbers: np.ndarray, order: Any) -> np.ndarray:
    """Eight numbers of 4 bits in each int32, `order` from the lowest bits."""
    rows, columns = numbers.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for column in range(columns // 8):
        for position, source in enumerate(order):
            nibble = numbers[:, column * 8 + source].astype(np.uint32) & 0xF
            words[:, column] |= nibble << np.uint32(4 * position)
    return words.view(np.int32)


def _tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write_checkpoint(
    plain: Path, directory: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> None:
    """The config of the plain one, with how it is quantized."""
    directory.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = dict(quantization)
    (directory / "config.json").write_text(json.dumps(config, default=str))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})


def write_dense(plain: Path, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    """The same checkpoint with dense weights, for transformers to load as the oracle."""
    directory.mkdir()
    (directory / "config.json").write_text((plain / "config.json").read_text())
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
