"""quantize_: packed weights in a model that runs eagerly and under every backend, equally."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
import fqcompile
from bench import moe_models
from fqcompile.weights.store import STORE
from tests.dense_models import CASES, build, run
from tests.helpers import Mlp, assert_close, finequant, frozen, report

CHAIN = 15  # rounded results in a layer, see `tests.test_moe_models`
SMALL: dict[str, Any] = {"min_elements": 4096}


def _oracle(model: nn.Module, plan: fqcompile.Plan) -> nn.Module:
    return fqcompile.fake_quantize_(copy.deepcopy(model), plan)


def _packed(model: nn.Module) -> tuple[nn.Module, fqcompile.Plan]:
    packed = copy.deepcopy(model)
    return packed, fqcompile.quantize_(packed, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_dense_model_equals_its_oracle_eagerly_and_compiled(name: str, dtype: torch.dtype) -> None:
    model, inputs = build(name, dtype)
    packed, plan = _packed(model)
    expected = run(_oracle(model, plan), inputs)
    depth = CHAIN * CASES[name].layers
    assert_close(run(packed, inputs), expected, depth=depth)
    whole = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert_close(run(whole, inputs), expected, depth=depth)
    torch._dynamo.reset()
    assert_close(run(finequant(packed, **SMALL), inputs), expected, depth=depth)
    assert not any(s.status == "kept" and s.name in _names(plan) for s in report().sites)
    original = run(model, inputs)
    assert (expected - original).float().norm() > 0.03 * original.float().norm()


def _names(plan: fqcompile.Plan) -> set[str]:
    return {site.name for site in plan.quantized}


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", moe_models.MODELS)
def test_experts_equal_their_oracle_eagerly_and_compiled(
    name: str, implementation: str, dtype: torch.dtype
) -> None:
    model = moe_models.build(name, dtype, implementation)
    ids = torch.randint(1, moe_models.VOCAB, (2, 5), generator=torch.Generator().manual_seed(7))
    packed, plan = _packed(model)
    stacks = set(moe_models.expert_weights(model))
    assert {site.name for site in plan.quantized if site.kind == "experts"} == stacks
    expected = _logits(_oracle(model, plan), ids)
    depth = CHAIN * moe_models.LAYERS
    assert_close(_logits(packed, ids), expected, depth=depth)
    if implementation == "eager" and name != "llama4":
        return  # a loop over data: no one graph
    whole = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert_close(_logits(whole, ids), expected, depth=depth)
    torch._dynamo.reset()
    assert_close(_logits(finequant(packed, **SMALL), ids), expected, depth=depth)
    assert {site.name for site in report().plan.quantized} == _names(plan)


def test_finequant_reads_the_memory_of_the_packed_weights() -> None:
    """One matmul of each kind that is not merged with others: no second copy."""
    packed, _ = _packed(frozen(Mlp()))
    compiled = finequant(packed)
    compiled(torch.randn(2, 128))
    held = STORE.tensors_of((packed.up.weight,))
    assert {t.data_ptr() for t in held} == {
        packed.up.weight.qweight.data_ptr(),
        packed.up.weight.scale.data_ptr(),
    }
