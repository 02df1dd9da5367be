"""Mixture-of-Experts models through the backend with the Triton family, run by the interpreter."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("transformers", reason="the demo extra is not installed")

from fqcompile.kernels.spec import A100, H200, Gpu
from tests.helpers import (
    InnerGraphs,
    assert_quantized_like_oracle,
    finequant,
    frozen,
    report,
)
from tests.moe_models import LAYERS, LAYERS_OF_OUR_OWN, VOCAB, WIDTH, build, expert_weights
from tests.test_triton_backend import on  # noqa: F401  (the fixture)

BF16 = torch.bfloat16
CHAIN = 15  # see tests.test_moe_models


@pytest.mark.few(1)
@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_model_computes_what_its_dequantized_weights_say(
    on: Any,  # noqa: F811
    name: str,
    implementation: str,
    gpu: Gpu,
) -> None:
    on(gpu)
    model = build(name, BF16, implementation)
    ids = torch.randint(1, VOCAB, (1, 4), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        actual = finequant(model, min_elements=4096)(ids, use_cache=False).logits
        assert_quantized_like_oracle(
            model, actual, lambda m: m(ids, use_cache=False).logits, depth=CHAIN * LAYERS
        )
    kernels = {s.name: str(s.kernel) for s in report().sites if s.kind == "experts"}
    assert kernels.keys() == expert_weights(model).keys()
    assert all(kernel.startswith("triton_gemm") for kernel in kernels.values()), kernels


@pytest.mark.parametrize("name", ["w[ids] by einsum", "GShard", "Tutel"])
def test_layer_of_our_own_in_fp16(on: Any, name: str) -> None:  # noqa: F811
    on(H200)
    model = frozen(LAYERS_OF_OUR_OWN[name]()).half()
    x = torch.randn(2, 3, WIDTH).half()
    with torch.no_grad():
        actual = finequant(model, min_elements=4096)(x)
        assert_quantized_like_oracle(model, actual, lambda m: m(x), depth=4)


@pytest.mark.slow
def test_prefill_and_decode_read_one_copy_in_fragment_order(
    on: Any,  # noqa: F811
    inner_graphs: InnerGraphs,
) -> None:
    on(H200)
    model = build("qwen3-moe", BF16, "grouped_mm")
    compiled = finequant(model, min_elements=4096, inner_backend="fqtest_spy")
    with torch.no_grad():
        compiled(torch.ones(1, 9, dtype=torch.int64), use_cache=False)
        model.set_experts_implementation("batched_mm")
        compiled(torch.ones(1, 1, dtype=torch.int64), use_cache=False)
    prefill, decode = (inner_graphs.packed_of_experts(i) for i in range(2))
    assert len(prefill) == 4 * LAYERS
    assert all(a is b for a, b in zip(prefill, decode, strict=True))


def test_open_number_of_tokens(on: Any) -> None:  # noqa: F811
    """One graph for decoding and prefill, by a few kernels each."""
    on(H200)
    model = frozen(LAYERS_OF_OUR_OWN["GShard"](capacity=32)).to(BF16)
    compiled = finequant(model, dynamic=True, min_elements=4096)
    for tokens in (3, 20, 7):
        x = torch.randn(2, tokens, WIDTH).to(BF16)
        with torch.no_grad():
            assert_quantized_like_oracle(model, compiled(x), lambda m, x=x: m(x), depth=4)
    assert "m" in str(next(s.kernel for s in report().sites if s.kind == "experts"))
