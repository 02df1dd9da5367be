"""free_weights=True on whole models: bit-equal, freed but for embeddings, restored exactly."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
import fqcompile
from bench import moe_models
from fqcompile.report import clear_reports
from fqcompile.weights.freed import is_freed
from tests.dense_models import CASES, VOCAB, build, run
from tests.helpers import finequant, oracle
from tests.test_moe_models import _ids, _logits


def _freed(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if is_freed(weight)}


def _check(model: nn.Module, runs: list[Callable[[Any], Tensor]], **options: Any) -> None:
    """The same results as without freeing; then all that was quantised is freed, and restorable."""
    twin = copy.deepcopy(model)
    keeping = finequant(twin, **options)
    expected = [one(keeping) for one in runs]
    plan = fqcompile.reports()[0]
    torch._dynamo.reset()
    clear_reports()
    freeing = finequant(model, free_weights=True, **options)
    for _ in range(2):
        for one, want in zip(runs, expected, strict=True):
            assert torch.equal(one(freeing), want)
    assert not any(r.warnings for r in fqcompile.reports())
    _check_freed(model)
    names = _freed(model)
    fqcompile.restore(model)
    dequantised = dict(oracle(twin, plan).named_parameters())
    for name, weight in model.named_parameters():
        want = dequantised[name] if name in names else twin.get_parameter(name)
        assert torch.equal(weight, want), name
    for one, want in zip(runs, expected, strict=True):
        assert torch.equal(one(freeing), want)


def _check_freed(model: nn.Module) -> None:
    quantized = {s.name: s for s in fqcompile.reports()[0].plan.quantized}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {name for name in quantized if id(parameters[name]) in embeddings}
    assert _freed(model) == set(quantized) - kept
    assert len(quantized) > len(kept)
    for name in kept:
        assert quantized[name].not_freed == "embedding reads it as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_model_is_freed(name: str, dtype: torch.dtype) -> None:
    model, inputs = build(name, dtype)
    _check(model, [lambda m: run(m, inputs)])


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_prefill_and_decode(name: str) -> None:
    """Two graphs with their own kernels and fusions, from one packed copy."""
    model, _ = build(name, torch.bfloat16)
    prompt, token = torch.randint(0, VOCAB, (1, 80)), torch.randint(0, VOCAB, (1, 1))
    runs = [lambda m, ids=ids: run(m, {"input_ids": ids}) for ids in (prompt, token)]
    _check(model, runs, dynamic=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", moe_models.MODELS)
def test_mixture_of_experts_grouped_for_the_prompt_gathered_for_a_token(
    name: str, dtype: torch.dtype
) -> None:
    model = moe_models.build(name, dtype, "grouped_mm")

    def switch(compiled: Any, implementation: str) -> None:
        if name != "llama4":  # which has one of its own
            compiled.set_experts_implementation(implementation)

    def prefill(compiled: Any) -> Tensor:
        switch(compiled, "grouped_mm")
        return _logits(compiled, _ids(40))

    def decode(compiled: Any) -> Tensor:
        switch(compiled, "batched_mm")
        return _logits(compiled, _ids(1))

    stacks = set(moe_models.expert_weights(model))
    _check(model, [prefill, decode], min_elements=4096, dynamic=False)
    assert stacks <= {s.name for s in fqcompile.reports()[0].plan.quantized if s.freed}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_blocks_compiled_in_place(name: str) -> None:
    """As `compile_repeated_blocks` does: the head and the embeddings stay eager."""
    model, inputs = build(name, torch.float32)
    twin = copy.deepcopy(model)
    results = []
    for own, free in ((twin, False), (model, True)):
        options = {"inner_backend": "eager", "free_weights": free}
        for block in (own.model.decoder if name == "opt" else own.model).layers:
            block.compile(backend="finequant", options=options)
        results += [run(own, inputs), run(own, inputs)]
        torch._dynamo.reset()
    assert all(torch.equal(r, results[0]) for r in results)
    assert _freed(model) and all(".layers." in name for name in _freed(model))


@pytest.mark.slow
def test_generate_with_prefill_and_decode_compiled() -> None:
    model, _ = build("llama", torch.float32)
    prompt = torch.randint(1, VOCAB, (1, 9))
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    tokens = []
    for own, free in ((copy.deepcopy(model), False), (model, True)):
        own.forward = torch.compile(
            own.forward, backend="finequant", fullgraph=True, options={"free_weights": free}
        )
        with torch.no_grad():
            tokens.append(own.generate(prompt, **settings).tolist())
        torch._dynamo.reset()
    assert tokens[0] == tokens[1]
    assert len(_freed(model)) == 11, "five a layer and the head; k and v are below min_elements"
