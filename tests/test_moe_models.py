"""Mixture-of-Experts models: one graph, all experts quantized, equal to the dequantized model."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf
from packaging.version import Version

import fqcompile
from fqcompile.passes.op_nodes import argument, is_linear
from fqcompile.weights.recipe import target_name
from fqcompile.weights.store import STORE
from tests.helpers import (
    InnerGraphs,
    assert_close,
    assert_not_dense,
    assert_quantized_like_oracle,
    finequant,
    frozen,
    oracle,
    quantized_names,
    report,
)
from tests.moe_models import (
    EXPERTS,
    LAYERS,
    LAYERS_OF_OUR_OWN,
    MODELS,
    VOCAB,
    WIDTH,
    GShardMoe,
    build,
    expert_weights,
    logits,
)

IMPLEMENTATIONS = ["grouped_mm", "batched_mm"]
# Between a projection and its unit, whether or not experts lie on several ranks.
MASKS_PRODUCTS = Version(hf.__version__) < Version("5.23")
# Rounded results that follow each other in a layer, see `tests.test_models`; here also the unit's
# product, the product with the router's weight and the sum over a token's experts.
CHAIN = 15


# Seeds of ids. Where two experts score a token alike, bf16's rounding chooses one.
SEED, SEEDS = 5, {"deepseek-v3": 6}


def _ids(length: int = 5, batch: int = 2, seed: int = SEED) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.few(7)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_its_fake_quantized_self(
    name: str, implementation: str, dtype: torch.dtype
) -> None:
    model, ids = build(name, dtype, implementation), _ids(seed=SEEDS.get(name, SEED))
    actual = logits(finequant(model, min_elements=4096), ids)
    expected = logits(oracle(model), ids)
    assert_close(actual, expected, depth=CHAIN * LAYERS)
    assert_not_dense(actual, expected, logits(model, ids))
    assert set(expert_weights(model)) <= quantized_names(report().sites)
    assert {s.name for s in report().sites if s.kind == "experts"} == set(expert_weights(model))
    assert not report().warnings


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_projection_bias_and_unit_are_one_op(
    name: str, implementation: str, inner_graphs: InnerGraphs
) -> None:
    model = build(name, torch.float32, implementation)
    logits(finequant(model, min_elements=4096, inner_backend="fqtest_spy"), _ids())
    of_experts = [op for op in inner_graphs.linears() if not is_linear(op)]
    assert len(of_experts) == 2 * LAYERS
    calls = [n for n in inner_graphs.modules[0].graph.nodes if n.op == "call_function"]
    products = {"bmm", "_grouped_mm", "transformers.grouped_mm_fallback"}
    assert not products & {target_name(n.target) for n in calls}
    gated = not (implementation == "grouped_mm" and MASKS_PRODUCTS)
    assert [argument(op, "gated") for op in of_experts] == [gated, False] * LAYERS
    assert all((argument(op, "bias") is not None) == (name == "gpt-oss") for op in of_experts)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_routing_is_the_oracles(name: str, implementation: str) -> None:
    model = build(name, torch.float32, implementation)

    def routed(model: Any) -> list[Tensor]:
        with torch.no_grad():
            output = model(_ids(), use_cache=False, output_router_logits=True)
        return [scores.topk(2, dim=-1).indices for scores in output.router_logits]

    # Handing out the router's scores takes a lock, which breaks the graph.
    actual = routed(finequant(model, fullgraph=False, min_elements=4096))
    plan = fqcompile.explain(model, _ids(), min_elements=4096, example_kwargs={"use_cache": False})
    expected = routed(oracle(model, plan))
    assert len(actual) == len(expected) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_generate_with_a_static_cache_gives_the_oracles_tokens(name: str) -> None:
    """Prefill and decoding, through Inductor."""
    model = build(name, torch.float32, "grouped_mm")
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    prompt = _ids(batch=1)
    plan = fqcompile.explain(model, prompt, min_elements=4096, example_kwargs={"use_cache": False})
    expected = oracle(model, plan).generate(prompt, **options)
    model.forward = torch.compile(
        model.forward, backend="finequant", fullgraph=True, options={"min_elements": 4096}
    )
    with torch.no_grad():
        actual = model.generate(prompt, **options)
    assert actual.tolist() == expected.tolist()
    assert all(r.plan.quantized and not r.warnings for r in fqcompile.reports())


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_prefill_and_decode_share_one_packed_copy(
    name: str, dtype: torch.dtype, inner_graphs: InnerGraphs
) -> None:
    """As `generate` does on a GPU: grouped for the prompt, gathered for each token after it."""
    model = build(name, dtype, "grouped_mm")
    compiled = finequant(model, min_elements=4096, inner_backend="fqtest_spy")
    logits(compiled, _ids(40))
    model.set_experts_implementation("batched_mm")
    logits(compiled, _ids(1))
    assert len(inner_graphs.modules) == 2
    prefill, decode = (inner_graphs.packed_of_experts(i) for i in range(2))
    assert len(prefill) == 4 * LAYERS, "codes and scales of two stacks a layer"
    assert all(a is b for a, b in zip(prefill, decode, strict=True))
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in prefill}
    sites = [s for s in fqcompile.reports()[0].sites if s.kind == "experts"]
    # a kernel's layout may fill rows up, or store zero points
    assert sum(held.values()) <= 1.15 * sum(s.bytes_after for s in sites)


@pytest.mark.slow
def test_share_of_bytes_that_is_quantized() -> None:
    """Layers with the proportions of Mixtral-8x7B and Qwen3-30B-A3B; the vocabulary is small."""
    shapes: dict[str, dict[str, int]] = {
        "mixtral": {"hidden_size": 128, "intermediate_size": 448, "num_local_experts": 8},
        "qwen3-moe": {"hidden_size": 128, "moe_intermediate_size": 48, "num_experts": 128},
    }
    for name, sizes in shapes.items():
        config = MODELS[name]().config
        for key, value in sizes.items():
            setattr(config, key, value)
        model = frozen(type(MODELS[name]())(config))
        logits(finequant(model), _ids())
        total = sum(p.nbytes for p in model.parameters())
        done = sum(s.bytes_before for s in fqcompile.reports()[-1].plan.quantized)
        assert done / total > 0.9, f"{name}: {done / total:.3f} of {total} bytes"


SITES = {
    "w[ids] by einsum": ["experts"] * 3,
    "GShard": ["experts"] * 2,
    "Tutel": ["experts"] * 2,
    "ModuleList": ["linear"] * 2 * EXPERTS,
}


@pytest.mark.parametrize("name", LAYERS_OF_OUR_OWN)
def test_layer_of_our_own(name: str) -> None:
    model, x = frozen(LAYERS_OF_OUR_OWN[name]()), torch.randn(3, 6, WIDTH)
    with torch.no_grad():
        actual = finequant(model, min_elements=4096)(x)
        assert_quantized_like_oracle(model, actual, lambda m: m(x), depth=4)
    assert [s.kind for s in report().plan.quantized] == SITES[name]
    plan = fqcompile.explain(model, x, min_elements=1)
    assert str(plan.site("router.weight").reason).startswith("router")


def test_one_dynamic_graph_serves_every_number_of_tokens() -> None:
    """0 tokens too, fewer tokens than experts, and many."""
    model = frozen(GShardMoe(capacity=64))
    compiled = finequant(model, dynamic=True, min_elements=4096)
    for tokens in (5, 1, 2, 40):
        x = torch.randn(2, tokens, WIDTH)
        with torch.no_grad():
            actual = compiled(x)
            assert_close(actual, oracle(model, fqcompile.reports()[0])(x), depth=4)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dynamic_tokens_of_a_hugging_face_model(implementation: str) -> None:
    model = build("mixtral", torch.float32, implementation)
    compiled = finequant(model, dynamic=True, min_elements=4096)
    for length in (5, 1, 17):
        actual = logits(compiled, _ids(length))
        expected = logits(oracle(model, fqcompile.reports()[0]), _ids(length))
        assert_close(actual, expected, depth=CHAIN * LAYERS)


def test_bad_expert_keeps_its_stack_with_its_number() -> None:
    model = build("mixtral", torch.float32, "grouped_mm")
    stack = expert_weights(model)["model.layers.1.mlp.experts.down_proj"]
    stack[3, 5, 7] = torch.nan
    logits(finequant(model, min_elements=4096), _ids())
    site = report().plan.site("model.layers.1.mlp.experts.down_proj")
    assert site.status == "kept"
    assert site.reason.startswith("expert 3: 1 of 6144 values are NaN")


def test_report_has_the_error_of_each_expert() -> None:
    model = build("mixtral", torch.float32, "grouped_mm")
    logits(finequant(model, min_elements=4096), _ids())
    site = report().plan.site("model.layers.0.mlp.experts.gate_up_proj")
    stack = expert_weights(model)[site.name]
    faked = expert_weights(oracle(model))[site.name]
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(stack, faked, strict=True)]
    assert site.expert_errors == pytest.approx(errors, rel=1e-4)
    assert len(site.as_dict()["expert_errors"]) == EXPERTS
    assert "experts: 32 in 4 stacks, errors" in str(report())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_loop_over_data_is_reported_with_the_way_out(name: str) -> None:
    model = build(name, torch.float32, "eager")
    logits(finequant(model, fullgraph=False, min_elements=4096), _ids())
    warnings = [text for r in fqcompile.reports() for text in r.warnings]
    assert warnings and all("set_experts_implementation('grouped_mm')" in w for w in warnings)
    plan = fqcompile.explain(model, _ids(), min_elements=4096, example_kwargs={"use_cache": False})
    reasons = {site.name: site.reason for site in plan.kept}
    for stack in expert_weights(model):
        assert "set_experts_implementation('grouped_mm')" in reasons[stack]


def _without_a_switch(name: str) -> Any:
    """Models of transformers whose experts are a loop, and that cannot be told otherwise."""
    torch.manual_seed(0)
    if name == "dbrx":
        sizes: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
        ffn = {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2}
        config = hf.DbrxConfig(
            **sizes,
            vocab_size=128,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            ffn_config={**ffn, "ffn_act_fn": {"name": "silu"}},
        )
        return hf.DbrxForCausalLM(config).eval()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 128}
    heads = {"num_key_value_heads": 2, "kv_channels": 16}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return hf.JetMoeForCausalLM(hf.JetMoeConfig(**sizes, **heads, **experts)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dbrx", "jetmoe"])
def test_a_switch_that_a_model_does_not_have_is_not_offered(name: str) -> None:
    model = _without_a_switch(name).requires_grad_(False)
    with pytest.raises(ValueError, match="does not support setting experts implementation"):
        model.set_experts_implementation("grouped_mm")
    logits(finequant(model, fullgraph=False, min_elements=1024), _ids())
    warnings = [text for r in fqcompile.reports() for text in r.warnings]
    assert any("are not in its graph: the model picks them in a Python loop" in w for w in warnings)
    # What is said of the experts is what became of them: later graphs multiply with JetMoe's.
    found = {site.name for r in fqcompile.reports() for site in r.plan.quantized}
    assert any("linear.weight[" in name for name in found) == (name == "jetmoe")
    assert not any("experts of router" in w and "stay as they are" in w for w in warnings)
    plan = fqcompile.explain(model, _ids(), min_elements=1024, example_kwargs={"use_cache": False})
    texts = [*warnings, *(str(site.reason) for site in plan.kept)]
    if name == "dbrx":  # the graphs behind the breaks read JetMoe's experts one by one
        assert any("or a loop over data broke the graph" in text for text in texts)
    assert not [text for text in texts if "set_experts_implementation" in text]


def test_store_holds_experts_once(inner_graphs: InnerGraphs) -> None:
    """A second compilation of the same model packs nothing anew."""
    model = build("mixtral", torch.float32, "batched_mm")
    STORE.clear()
    for _ in range(2):
        torch._dynamo.reset()
        logits(finequant(model, min_elements=4096, inner_backend="fqtest_spy"), _ids())
    first, second = ([ref() for ref in packed] for packed in inner_graphs.packed)
    assert all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["w[ids] by einsum", "GShard", "Tutel"])
def test_gradients_flow_through_frozen_experts(name: str) -> None:
    """As for adapters before a frozen layer: dx is the dequantized model's."""
    model, x = frozen(LAYERS_OF_OUR_OWN[name]()), torch.randn(2, 5, WIDTH)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    actual = finequant(model, min_elements=4096, inner_backend="aot_eager")(inputs[0])
    expected = oracle(model)(inputs[1])
    assert_close(actual, expected, depth=4)
    probe = torch.randn(actual.shape)
    for y in (actual, expected):
        (y * probe).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, depth=8)
    assert report().plan.quantized
