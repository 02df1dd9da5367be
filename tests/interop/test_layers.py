"""What names of layers tell, name by name as models of transformers have them."""

import pytest

from fqcompile.interop.layers import (
    fused_name,
    is_embedding,
    is_split_along_k,
    is_split_along_n,
    stack_of,
)

LAYER = "model.layers.7."
ALONG_K = """self_attn.o_proj mlp.down_proj self_attn.dense attention.output.dense output.dense fc2
self_attn.out_proj mlp.dense_4h_to_h block_sparse_moe.experts.3.w2 mlp.experts.10.down_proj"""
ALONG_N = """self_attn.q_proj mlp.gate_proj mlp.up_proj intermediate.dense fc1 mlp.dense_h_to_4h
self_attn.qkv_proj mlp.experts.0.gate_proj block_sparse_moe.experts.0.w1 self_attn.q_b_proj"""
NEITHER = """self_attn.k_proj self_attn.v_proj mlp.gate mlp.shared_expert_gate self_attn.q_a_proj
self_attn.kv_a_proj_with_mqa feed_forward.router block_sparse_moe.router.layer"""


@pytest.mark.parametrize("own", ALONG_K.split())
def test_split_along_k(own: str) -> None:
    assert is_split_along_k(LAYER + own)
    assert not is_split_along_n(LAYER + own)


@pytest.mark.parametrize("own", ALONG_N.split())
def test_split_along_n(own: str) -> None:
    assert is_split_along_n(LAYER + own)
    assert not is_split_along_k(LAYER + own)


@pytest.mark.parametrize("own", NEITHER.split())
def test_split_along_neither(own: str) -> None:
    assert not is_split_along_n(LAYER + own)
    assert not is_split_along_k(LAYER + own)


FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
    "feed_forward.w3": "feed_forward.gate_up_proj",
    "feed_forward.w2": "feed_forward.w2",
    "self_attn.kv_a_proj_with_mqa": "self_attn.fused_qkv_a_proj",
    "linear_attn.in_proj_z": "linear_attn.in_proj_qkvz",
}
PRESENT = """self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj
mlp.up_proj
feed_forward.w1 feed_forward.w2 feed_forward.w3 self_attn.q_a_proj self_attn.kv_a_proj_with_mqa
linear_attn.in_proj_qkv linear_attn.in_proj_z other.up_proj"""


@pytest.mark.parametrize("own", FUSED)
def test_parts_of_fused_layers(own: str) -> None:
    present = {LAYER + name for name in PRESENT.split()}
    assert fused_name(LAYER + own, present) == LAYER + FUSED[own]
    assert fused_name(own, {name.removeprefix(LAYER) for name in present}) == FUSED[own]


def test_a_part_without_its_partners_is_not_fused() -> None:
    assert fused_name("mlp.up_proj", {"mlp.up_proj", "mlp.down_proj"}) == "mlp.up_proj"
    assert fused_name("a.q_proj", {"a.q_proj", "b.k_proj"}) == "a.q_proj"


def test_experts_embeddings_and_heads() -> None:
    assert stack_of("model.layers.3.mlp.experts.12.up_proj") == "model.layers.3.mlp.experts"
    assert stack_of("experts.0.w1") == "experts"
    assert stack_of("model.layers.3.mlp.shared_experts.up_proj") is None
    for name in ("model.embed_tokens", "transformer.wte", "embeddings.word_embeddings", "shared"):
        assert is_embedding(name), name
    for name in ("lm_head", "embed_out", "model.layers.0.mlp.up_proj", "patch_embed.proj"):
        assert not is_embedding(name), name
