"""LoRA on a base that from_pretrained opened: trained, saved, opened beside it, merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the dev extra is not installed")
import peft
import transformers as hf

import fqcompile
from fqcompile.errors import FineQuantError
from fqcompile.integrations.transformers import FineQuantHfConfig
from fqcompile.weights.parameter import PackedWeight
from tests.dense_models import build, run

OPTIONS: dict[str, Any] = {"granularity": 64, "min_elements": 1024}


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Any]:
    """A packed checkpoint, and inputs."""
    model, inputs = build("llama", torch.float32)
    model.save_pretrained(tmp_path / "dense")
    config = FineQuantHfConfig(**OPTIONS)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    loaded.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", inputs


def _adapted(directory: Path, *targets: str) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_pretrained(directory)
    assert model.hf_quantizer.is_trainable
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj", *targets], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def test_an_adapter_trains_and_is_opened_beside_its_base(base: Any, tmp_path: Path) -> None:
    directory, inputs = base
    model = _adapted(directory)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and not any(isinstance(p, PackedWeight) for p in trained)
    optimizer = torch.optim.AdamW(trained, 1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    expected = run(model.eval().base_model.model, inputs)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(run(opened, inputs), expected)
    loaded = hf.AutoModelForCausalLM.from_pretrained(directory)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(run(loaded, inputs), expected)


def test_an_adapter_on_the_head_is_saved_as_the_error_says(base: Any, tmp_path: Path) -> None:
    directory, inputs = base
    model = _adapted(directory, "lm_head").eval()
    assert isinstance(model.base_model.model.lm_head.base_layer.weight, PackedWeight)
    with pytest.raises(FineQuantError, match=r"peft.*, save_embedding_layers=False"):
        model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = hf.AutoModelForCausalLM.from_pretrained(directory)
    opened = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert torch.equal(run(opened, inputs), run(model, inputs))


def test_the_trainer_of_transformers_takes_it(base: Any, tmp_path: Path) -> None:
    directory, inputs = base
    rows = [{"input_ids": row, "labels": row} for row in inputs["input_ids"]]
    arguments = hf.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[], save_strategy="no"
    )
    alone = hf.AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="purely quantized models"):
        hf.Trainer(alone, arguments, train_dataset=rows)
    model = _adapted(directory)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    hf.Trainer(model, arguments, train_dataset=rows).train()
    assert before and all(
        not torch.equal(model.get_parameter(name), values) for name, values in before.items()
    )


def test_an_adapter_is_merged_into_dense_values_and_packed_again(base: Any, tmp_path: Path) -> None:
    directory, inputs = base
    model = _adapted(directory)
    before = {name: p.detach() + 0 for name, p in model.named_parameters()}
    for safely in (False, True):
        with pytest.raises(FineQuantError, match=r"restore\(model\) to .* or to merge an adapter"):
            model.merge_and_unload(safe_merge=safely)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach() + 0, before[name]), name
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.dequantized() + layer.scaling["default"] * (up @ down)
    merged = fqcompile.restore(model).merge_and_unload()
    weight: nn.Parameter = merged.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight, expected.detach())
    plan = fqcompile.quantize_(merged, calibration=None, **OPTIONS)
    assert plan.site("model.layers.0.self_attn.q_proj.weight").status == "quantized"
    merged.save_pretrained(tmp_path / "merged")
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(run(opened, inputs), run(merged, inputs))
