"""LoRA adapters on packed weights: they train as on the dequantized base, which stays frozen."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.errors import FineQuantError
from fqcompile.weights.parameter import PackedWeight
from tests.dense_models import build

peft = pytest.importorskip("peft", reason="the dev extra is not installed")
STEPS = 4


def _with_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _losses(model: nn.Module, run: Any, ids: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(STEPS):
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(
    "backend", ["none", "finequant", pytest.param("aot_eager", marks=pytest.mark.slow)]
)
def test_adapters_train_as_on_the_dequantized_base(backend: str) -> None:
    model, inputs = build("llama", torch.float32)
    packed = copy.deepcopy(model)
    plan = fqcompile.quantize_(packed, min_elements=4096)
    expected_model = _with_adapters(fqcompile.fake_quantize_(model, plan))
    expected = _losses(expected_model, expected_model, inputs["input_ids"])
    adapted = _with_adapters(packed)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    codes = {n: p.qweight.clone() for n, p in adapted.named_parameters() if _is_packed(p)}
    options = {"options": {"inner_backend": "aot_eager"}} if backend == "finequant" else {}
    run = adapted if backend == "none" else torch.compile(adapted, backend=backend, **options)
    losses = _losses(adapted, run, inputs["input_ids"])
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    parameters = dict(adapted.named_parameters())
    assert codes and all(torch.equal(parameters[n].qweight, c) for n, c in codes.items())  # type: ignore[attr-defined]


def _is_packed(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, PackedWeight)


def test_merging_an_adapter_into_codes_is_refused() -> None:
    model = build("llama", torch.float32)[0]
    fqcompile.quantize_(model, min_elements=4096)
    with pytest.raises(FineQuantError, match="would write to a packed weight"):
        _with_adapters(model).merge_and_unload()
