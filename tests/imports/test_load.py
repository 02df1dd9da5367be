"""What others quantised opens with packed weights of the same values, and runs."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

import fqcompile
from fqcompile.errors import CheckpointError
from fqcompile.weights.packed_weight import PackedWeight
from tests.exports.models import library_dense, make
from tests.helpers import assert_close, finequant, report
from tests.imports.writers import (
    arguments,
    awq_parts,
    gptq_parts,
    write_by_library,
    write_dense,
    write_each_layer,
    write_four_bit,
)


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


def assert_same_values(loaded: Any, oracle: Any, packed: int) -> None:
    """Every parameter is bit for bit the oracle's, `packed` of them without being dense."""
    expected = dict(oracle.named_parameters(remove_duplicate=False))
    found = dict(loaded.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    assert sum(isinstance(w, PackedWeight) for w in found.values()) == packed
    for name, weight in found.items():
        dense = weight.dequantized() if isinstance(weight, PackedWeight) else weight
        assert dense.dtype == expected[name].dtype, name
        assert torch.equal(dense, expected[name]), name


SCHEMES = [(4, 32, True), (4, 128, True), (8, None, True), (8, 64, True), (4, 64, False)]


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_models_that_the_library_saved(
    bits: int, group_size: int | None, symmetric: bool, tmp_path: Path
) -> None:
    model, inputs = make("llama", tmp_path / "plain")
    write_by_library(model, arguments(bits, group_size, symmetric), tmp_path / "packed")
    if symmetric:
        oracle = type(model).from_pretrained(tmp_path / "packed").eval()
    else:  # this transformers takes no zero points
        dense = library_dense(tmp_path / "packed")
        dense = {k: v for k, v in dense.items() if not k.endswith("weight_zero_point")}
        write_dense(tmp_path / "plain", tmp_path / "dense", dense)
        oracle = type(model).from_pretrained(tmp_path / "dense").eval()
    expected = logits(oracle, inputs)  # by its dense weights
    loaded: Any = fqcompile.load(None, tmp_path / "packed")
    bits_found = {p.form.bits for p in loaded.parameters() if isinstance(p, PackedWeight)}
    assert bits_found == {bits} if symmetric else {8}  # 4 bits less a zero point reach further
    assert_close(logits(loaded, inputs), expected, depth=14)
    assert torch.equal(logits(fqcompile.restore(loaded), inputs), expected)


MIXED = {
    "experts": arguments(4, 32),
    "self_attn.q_proj": arguments(8, None),
    "self_attn": arguments(4, 64),
    "mlp": arguments(4, None),
}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_experts_that_the_library_packed(name: str, tmp_path: Path) -> None:
    model, inputs = make(name, tmp_path / "plain")
    own = {"kv_b_proj": arguments(4, 32), "q_b_proj": arguments(4, 32)}
    dense = write_each_layer(tmp_path / "plain", tmp_path / "packed", {**own, **MIXED})
    oracle = type(model).from_pretrained(write_dense(tmp_path / "plain", tmp_path / "dense", dense))
    loaded = fqcompile.load(None, tmp_path / "packed")
    assert_same_values(loaded, oracle, packed=16 if name == "deepseek-v3" else 12)
    assert torch.equal(logits(fqcompile.restore(loaded), inputs), logits(oracle.eval(), inputs))


def test_experts_of_one_layer_in_different_schemes(tmp_path: Path) -> None:
    """One stack of the model holds them all, exactly."""
    model, _ = make("mixtral", tmp_path / "plain")
    schemes = {
        "experts.1.w1": arguments(8, 32),
        "experts.2": arguments(4, None),
        "experts": arguments(4, 32),
    }
    dense = write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    oracle = type(model).from_pretrained(write_dense(tmp_path / "plain", tmp_path / "dense", dense))
    loaded = fqcompile.load(None, tmp_path / "packed")
    assert_same_values(loaded, oracle, packed=4)


def zero_points(low: int, high: int) -> Any:
    return lambda rng, shape: rng.integers(low, high + 1, shape)


GPTQ: dict[str, Any] = {"quant_method": "gptq", "desc_act": False, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "version": "gemm", "zero_point": True}
FOUR_BIT = {
    "gptq symmetric": (gptq_parts, GPTQ, zero_points(8, 8), 4),
    "gptq": (gptq_parts, GPTQ, zero_points(1, 15), 8),
    "gptq v2": (partial(gptq_parts, less=0), {**GPTQ, "checkpoint_format": "gptq_v2"},
                zero_points(0, 15), 8),
    "awq symmetric": (awq_parts, AWQ, zero_points(8, 8), 4),
    "awq": (awq_parts, AWQ, zero_points(0, 15), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_gptq_and_awq(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packer, quantization, zeros, bits = FOUR_BIT[kind]
    model, _ = make(name, tmp_path / "plain")
    dense = write_four_bit(tmp_path / "plain", tmp_path / "packed", packer, quantization, zeros)
    oracle = type(model).from_pretrained(write_dense(tmp_path / "plain", tmp_path / "dense", dense))
    loaded = fqcompile.load(None, tmp_path / "packed")
    assert_same_values(loaded, oracle, packed=14 if name == "llama" else 12)
    found = {p.form.bits for p in loaded.parameters() if isinstance(p, PackedWeight)}
    assert found == {bits}
    assert ("weights are held as int8 codes" in caplog.text) == (bits == 8)


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            real = isinstance(tensor, torch.Tensor) and not tensor.is_meta
            if real and not isinstance(tensor, PackedWeight) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_dense_weight_is_ever_made(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "plain")
    schemes = {"experts": arguments(4, 32), "self_attn": arguments(8, None)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    with Largest() as largest:
        loaded = fqcompile.load(None, tmp_path / "packed")
    stacks = [p for p in loaded.parameters() if isinstance(p, PackedWeight) and p.dim() == 3]
    assert len(stacks) == 4
    dense = max(p.numel() for p in loaded.parameters() if not isinstance(p, PackedWeight))
    assert largest.elements <= dense < min(p.numel() for p in stacks)


def test_an_imported_model_runs_compiled_and_is_saved(tmp_path: Path) -> None:
    _, inputs = make("mixtral", tmp_path / "plain", torch.float32)
    schemes = {"experts": arguments(4, 32), "self_attn": arguments(8, None)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    model = fqcompile.load(None, tmp_path / "packed")
    compiled = finequant(model, min_elements=1024, exclude=["lm_head"])
    assert_close(logits(compiled, inputs), logits(model, inputs), depth=14)
    assert len(report().plan.quantized) == 12
    fqcompile.save(model, tmp_path / "saved")
    again = fqcompile.load(None, tmp_path / "saved")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        fqcompile.load(None, directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"desc_act": True}, "quantization_config.desc_act is True, and only False"),
        ({"desc_act": 0}, "quantization_config.desc_act is 0, and only False"),
        ({"bits": 3}, "quantization_config.bits is 3, and only 4"),
        ({"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format is 'marlin'"),
        ({"quant_method": "aqlm"}, "quantization_config.quant_method is 'aqlm'; this opens"),
    ],
)
def test_gptq_that_has_no_exact_conversion(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make("llama", tmp_path / "plain")
    quantization = {**GPTQ, **changes}
    write_four_bit(
        tmp_path / "plain", tmp_path / "packed", gptq_parts, quantization, zero_points(8, 8)
    )
    refused(tmp_path / "packed", message)


def test_act_order_is_seen_in_the_order_itself(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")

    def shuffled(codes: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
        parts = gptq_parts(codes, zeros)
        return {**parts, "g_idx": parts["g_idx"][::-1]}

    write_four_bit(tmp_path / "plain", tmp_path / "packed", shuffled, GPTQ, zero_points(8, 8))
    refused(tmp_path / "packed", "g_idx is not k // group_size")


def test_a_zero_point_that_programs_read_differently(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")
    write_four_bit(tmp_path / "plain", tmp_path / "packed", gptq_parts, GPTQ, zero_points(0, 15))
    refused(tmp_path / "packed", "qzeros stores 15")


def test_awq_in_the_order_of_another_kernel(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")
    quantization = {**AWQ, "version": "gemv"}
    write_four_bit(
        tmp_path / "plain", tmp_path / "packed", awq_parts, quantization, zero_points(8, 8)
    )
    refused(tmp_path / "packed", "quantization_config.version is 'gemv'")


def test_a_model_in_place_of_none_is_refused(tmp_path: Path) -> None:
    model, _ = make("llama", tmp_path / "plain")
    schemes = {"mlp": arguments(4, 32)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    with pytest.raises(CheckpointError, match="give None in place of a model"):
        fqcompile.load(model, tmp_path / "packed")


def test_experts_of_which_some_are_dense_are_refused(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "plain")
    schemes = {f"experts.{e}": arguments(4, 32) for e in range(1, 8)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    with pytest.raises(CheckpointError, match=r"is packed and .*experts\.0.* is not"):
        fqcompile.load(None, tmp_path / "packed")
