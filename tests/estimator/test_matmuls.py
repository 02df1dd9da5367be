"""Sharing out: what a model does not allow is refused; together the GPUs hold the whole model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.errors import EstimateError
from fqcompile.estimator.decoder import Decoder
from fqcompile.estimator.matmuls import Sharing, check, kv_heads_of_a_gpu, matrices
from fqcompile.estimator.model_shapes import read_decoder
from tests.estimator.shapes import LLAMA, MIXTRAL, decoder

QWEN = {**MIXTRAL, "model_type": "qwen2_moe", "num_experts": 8, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128, "decoder_sparse_step": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "sharing", "expected"),
    [
        (decoder(), Sharing(3), "tp 3 neither divides nor is divided by 4 KV heads"),
        (decoder(), Sharing(16), "tp 16 does not divide 8 heads"),
        (decoder(intermediate_size=500), Sharing(8), "tp 8 does not divide 500 columns of the MLP"),
        (decoder(), Sharing(1, 2), "has no experts; use tp"),
        (decoder(MIXTRAL), Sharing(4, 6), "one must divide the other"),
        (decoder(MIXTRAL), Sharing(1, 16), "ep 16 does not divide 8 experts"),
        (decoder(MIXTRAL, intermediate_size=500), Sharing(8, 1), "8 shards do not divide 500"),
        (decoder(QWEN, shared_expert_intermediate_size=66), Sharing(4, 4), "the shared expert"),
        (decoder(), Sharing(0), "at least 1"),
    ],
)
def test_what_does_not_divide_is_named(shape: Decoder, sharing: Sharing, expected: str) -> None:
    with pytest.raises(EstimateError, match=expected):
        check(shape, sharing)


def test_kv_heads_are_copied_where_there_are_more_gpus() -> None:
    shape = read_decoder("qwen3-235b-a22b")  # 4 KV heads of 128
    assert [kv_heads_of_a_gpu(shape, Sharing(tp)) for tp in (1, 2, 4, 8)] == [4, 2, 1, 1]
    qkv = next(m for m in matrices(shape, Sharing(8)) if m.name == "qkv")
    assert (qkv.n, qkv.k) == (64 // 8 * 128 + 2 * 128, 4096)


DEGREES = st.sampled_from([1, 2, 4])


@given(st.sampled_from([LLAMA, MIXTRAL, QWEN]), DEGREES, DEGREES)
def test_gpus_hold_the_whole_model_together(config: dict[str, object], tp: int, ep: int) -> None:
    shape, sharing = decoder(config), Sharing(tp, ep if "num_experts_per_tok" in config else 1)
    check(shape, sharing)
    whole, parts = ({m.name: m for m in matrices(shape, s)} for s in (Sharing(), sharing))
    for name, matrix in whole.items():
        over = sharing.gpus if matrix.experts else 1 if matrix.kept else tp
        assert parts[name].weights * over == matrix.weights, name
    held = sum(m.weights for m in whole.values())
    assert held == shape.parameters - shape.embedding_weights - shape.vectors
