"""Every model family: saved and loaded, or quantized from its checkpoint, logits are bit-equal."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf

import fqcompile
from fqcompile.weights.parameter import PackedWeight
from tests.dense_models import CASES
from tests.dense_models import build as build_dense
from tests.moe_models import MODELS as MOE_MODELS
from tests.moe_models import build as build_moe

OPTIONS: dict[str, Any] = {"min_elements": 4096}
NAMES = [*CASES, *MOE_MODELS]


def make(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A frozen model with values everywhere, and inputs for it."""
    if name in CASES:
        return build_dense(name, dtype)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 100, (2, 5), generator=generator)
    return build_moe(name, dtype, "grouped_mm"), {"input_ids": ids}


def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All floating point tensors that the model returns, nested ones left out."""
    with torch.no_grad():
        found = model(**inputs).to_tuple()
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), (a - b).abs().max()


def factory(model: Any) -> Callable[[], nn.Module]:
    """What builds another model like this one."""
    return lambda: type(model)(copy.deepcopy(model.config)).eval()


@pytest.mark.few(9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_loaded_model_computes_what_the_saved_one_did(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, inputs = make(name, dtype)
    plan = fqcompile.quantize_(model, **OPTIONS)
    expected = outputs(model, inputs)
    fqcompile.save(model, tmp_path, plan=plan)
    for loaded in (fqcompile.load(factory(model), tmp_path), fqcompile.load(None, tmp_path)):
        packed = [p for p in loaded.parameters() if isinstance(p, PackedWeight)]
        assert len(packed) == len(plan.quantized)
        assert type(loaded) is type(model)
        if name in MOE_MODELS and name != "llama4":
            loaded.set_experts_implementation("grouped_mm")
        assert_same_bits(outputs(loaded, inputs), expected)


@pytest.mark.few(9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_checkpoint_is_the_quantized_model(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, inputs = make(name, dtype)
    model.save_pretrained(tmp_path / "plain", max_shard_size="100KB")
    reference = type(model).from_pretrained(tmp_path / "plain")
    # a model that is never whole in memory does not run
    expected_plan = fqcompile.quantize_(reference, calibration=None, **OPTIONS)
    plan = fqcompile.quantize_checkpoint(tmp_path / "plain", tmp_path / "out", **OPTIONS)
    assert _without_kernels(plan) == _without_kernels(expected_plan)
    loaded = fqcompile.load(None, tmp_path / "out")
    assert_same_tensors(loaded, reference)
    assert_same_bits(outputs(loaded, inputs), outputs(reference, inputs))
    if loaded.can_generate():
        assert loaded.generation_config == reference.generation_config


def assert_same_tensors(actual: nn.Module, expected: nn.Module) -> None:
    """Parameters and all buffers, by name, with the same ties."""

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        named = dict(model.named_parameters(remove_duplicate=False))
        return named | dict(model.named_buffers(remove_duplicate=False))

    found, wanted = tensors(actual), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert isinstance(other, PackedWeight) == isinstance(tensor, PackedWeight), name
        if isinstance(tensor, PackedWeight):
            assert other.format == tensor.format, name
            assert torch.equal(other.qweight, tensor.qweight), name
            assert torch.equal(other.scale, tensor.scale), name
        else:
            assert other.dtype == tensor.dtype, name
            assert torch.equal(other, tensor), name
        ties = {n for n, t in wanted.items() if t is tensor}
        assert {n for n, t in found.items() if t is other} == ties


def _without_kernels(plan: fqcompile.Plan) -> list[dict[str, object]]:
    rows = [site.as_dict() for site in plan.sites]
    return [{k: v for k, v in row.items() if k not in ("kernel", "bytes_after")} for row in rows]


READER = """
import json, sys, torch, transformers
import fqcompile
torch.set_num_threads(1)
model = fqcompile.load(None, sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    print(model(input_ids=ids).logits.double().sum().item().hex())
"""


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    model, inputs = make("qwen3-moe", torch.bfloat16)
    fqcompile.quantize_(model, **OPTIONS)
    fqcompile.save(model, tmp_path)
    ids = json.dumps(inputs["input_ids"].tolist())
    command = [sys.executable, "-c", READER, str(tmp_path), ids]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        expected = fqcompile.load(None, tmp_path)(**inputs).logits
        assert torch.equal(expected, model(**inputs).logits)
    assert printed.strip() == expected.double().sum().item().hex()


def test_configs_are_beside_the_weights(tmp_path: Path) -> None:
    model, _ = make("llama", torch.bfloat16)
    model.generation_config.max_new_tokens = 17
    fqcompile.quantize_(model, **OPTIONS)
    fqcompile.save(model, tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.hidden_size == model.config.hidden_size
    assert fqcompile.load(None, tmp_path).generation_config.max_new_tokens == 17
    assert config.quantization_config["quant_method"] == "finequant"
