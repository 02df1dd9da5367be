"""Bytes, against sums done by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.estimator.costs import kv_bytes, memory_of, weight_memory
from fqcompile.estimator.devices import DEVICES
from fqcompile.estimator.matmuls import Matrix, Sharing, WeightFormat, Workload, formats
from fqcompile.estimator.model_shapes import read_decoder
from tests.estimator.shapes import MIXTRAL, PLAIN, decoder

BF16, INT8, INT4 = formats(128, 8).values()


def test_keys_and_values_of_llama_3_70b() -> None:
    assert kv_bytes(80, 8, 128, 1) == 2 * 80 * 8 * 128 * 2 == 327_680
    memory = memory_of(
        read_decoder("llama-3-70b"), Sharing(8), INT4, Workload(16, 2048), DEVICES["h200"]
    )
    assert memory.kv == 327_680 // 8 * 16 * 2048


def test_weights_in_16_bits_are_the_parameters_but_for_what_is_shared_out() -> None:
    llama = read_decoder("llama-3-70b")
    assert weight_memory(llama, Sharing(), BF16, PLAIN) == 2 * llama.parameters
    opt = read_decoder("opt-175b")  # the head is the embedding
    assert weight_memory(opt, Sharing(), BF16, PLAIN) == 2 * opt.parameters


def test_quantised_weights_by_hand() -> None:
    """One layer of 256 wide: qkv 512 x 256, o 256 x 256, gate and up 1024 x 256, down 256 x 512."""
    shape = decoder(num_hidden_layers=1)
    weights, kept = (512 + 256 + 1024) * 256 + 256 * 512, (1000 * 256 + 3 * 256) * 2
    head8 = 1000 * 256 + 2 * 1000
    scales4 = 2 * ((512 + 256 + 1024) * 2 + 256 * 4)
    assert weight_memory(shape, Sharing(), INT4, PLAIN) == weights // 2 + scales4 + head8 + kept
    columns = 2 * (512 + 256 + 1024 + 256)
    assert weight_memory(shape, Sharing(), INT8, PLAIN) == weights + columns + head8 + kept
    head4 = 1000 * 256 // 2 + 2 * 1000 * 2
    form = WeightFormat("int4", 4, 128, 4)
    assert weight_memory(shape, Sharing(), form, PLAIN) == weights // 2 + scales4 + head4 + kept
    tied = decoder(num_hidden_layers=1, tie_word_embeddings=True)
    assert weight_memory(tied, Sharing(), INT4, PLAIN) == weights // 2 + scales4 + head8 + kept
    assert weight_memory(tied, Sharing(), BF16, PLAIN) == 2 * weights + kept


def test_routers_keep_16_bits() -> None:
    shape = decoder(MIXTRAL, num_hidden_layers=1)
    plain = decoder(num_hidden_layers=1)
    mlp = 3 * 512 * 256
    difference = weight_memory(shape, Sharing(), INT8, PLAIN) - weight_memory(
        plain, Sharing(), INT8, PLAIN
    )
    assert difference == 7 * (mlp + 2 * (1024 + 256)) + 8 * 256 * 2


def test_a_group_is_halved_until_shards_have_whole_ones() -> None:
    groups = {1536: 128, 192: 64, 160: 32, 136: 32, 96: 96, 64: 64}
    for k, expected in groups.items():
        assert INT4.group_of(Matrix("down", 1, 64, k)) == expected, k
    assert INT8.group_of(Matrix("down", 1, 64, 192)) == 192
    assert INT4.group_of(Matrix("head", 1, 64, 256, is_head=True)) == 256


def test_the_papers_claim() -> None:
    """OPT-175B: in 16 bits on 8 A100 of 80 GB and not on 4, in int4 of group 64 on 2."""
    form, load, gpu = formats(64, 8)["int4"], Workload(1, 1024), DEVICES["a100-80"]
    opt = read_decoder("opt-175b")
    fits = {n: memory_of(opt, Sharing(n), BF16, load, gpu).fits for n in (1, 2, 4, 8)}
    assert fits == {1: False, 2: False, 4: False, 8: True}
    assert memory_of(opt, Sharing(2), form, load, gpu).fits
    assert not memory_of(opt, Sharing(1), form, load, gpu).fits


def test_as_many_sequences_fit_as_it_says() -> None:
    shape, load = decoder(), Workload(1, 512)
    memory = memory_of(shape, Sharing(), INT4, load, PLAIN)
    full = replace(memory, kv=memory.most_sequences * memory.kv_of_a_sequence)
    assert full.fits
    assert not replace(full, kv=full.kv + memory.kv_of_a_sequence).fits


@given(st.integers(1, 200), st.integers(1, 2000), st.sampled_from([1, 2, 4]))
def test_memory_grows_with_work_and_shrinks_with_gpus_and_bits(
    batch: int, context: int, tp: int
) -> None:
    shape, load = decoder(MIXTRAL), Workload(batch, context)
    memory = memory_of(shape, Sharing(tp), INT4, load, PLAIN)
    assert memory.kv <= memory_of(shape, Sharing(tp), INT4, Workload(batch + 1, context), PLAIN).kv
    assert memory.total <= memory_of(
        shape, Sharing(tp), INT4, Workload(batch, context + 1), PLAIN
    ).total  # fmt: skip
    assert memory_of(shape, Sharing(2 * tp), INT4, load, PLAIN).total < memory.total
    weights = [memory_of(shape, Sharing(tp), f, load, PLAIN).weights for f in (INT4, INT8, BF16)]
    assert weights == sorted(weights)


def test_activations_by_hand() -> None:
    """Of 100 rows: the norm's result, and gate, up, their product and what goes in and out."""
    shape, load = decoder(vocab_size=8), Workload(1, 100)
    row = 256 + (2 * 256 + 3 * 512)
    assert memory_of(shape, Sharing(), BF16, load, PLAIN).activations == 100 * row * 2
    largest = 1024 * 256 * 2  # gate and up, in 16 bits
    assert memory_of(shape, Sharing(), INT4, load, PLAIN).activations == 100 * row * 2 + largest
    assert pytest.approx(0.95e9) == memory_of(shape, Sharing(), BF16, load, PLAIN).usable


def test_groups_hold_the_cache_of_their_own_sequences() -> None:
    shape, load = decoder(MIXTRAL), Workload(5, 10)
    memory = memory_of(shape, Sharing(2, 4), INT4, load, PLAIN)
    assert memory.kv == 3 * 10 * 3 * 2 * 2 * 32 * 2  # of 5 sequences 3, of 4 KV heads 2
