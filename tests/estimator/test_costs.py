"""Bytes and seconds, against sums done by hand; and that more of a thing never takes less."""

from dataclasses import replace
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqcompile.estimator.costs import (
    Rows,
    Speed,
    decode_speed,
    experts_read,
    kv_bytes,
    matmul_parts,
    memory_of,
    prefill_speed,
    weight_memory,
)
from fqcompile.estimator.devices import (
    DEVICES,
    Cluster,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
)
from fqcompile.estimator.matmuls import (
    Matrix,
    Sharing,
    WeightFormat,
    Workload,
    formats,
    matmul_seconds,
    matrices,
    spec_of,
)
from fqcompile.estimator.model_shapes import read_decoder
from fqcompile.kernels.roofline import ideal_seconds
from tests.estimator.shapes import MIXTRAL, PLAIN, decoder
from tests.tiers import examples

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


def test_quantized_weights_by_hand() -> None:
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


BF16, INT8, INT4 = formats(128, 8).values()
CLUSTER = Cluster(4, 1e7)  # machines of 4; as reached 8 MB/s between them
# Chunks beyond any workload here.
ALL = 1 << 20


def decode(load: Workload, form: WeightFormat = INT4, sharing: Sharing | None = None) -> Speed:
    return decode_speed(decoder(), sharing or Sharing(), form, load, PLAIN, CLUSTER)


def test_a_step_of_decoding_by_hand() -> None:
    """16 bits, one row, three layers, a cache of 100 tokens; 1 GB/s, and 10 µs for each launch."""
    speed = decode(Workload(1, 100), BF16)
    layer = 2 * ((512 + 256 + 1024) * 256 + 256 * 512)
    rows = 2 * ((256 + 512) + (256 + 256) + (256 + 512) + (512 + 256))
    head = 2 * (1000 * 256 + 256 + 1000)
    assert speed.matmuls == pytest.approx((3 * (layer + rows) + head) / 1e9 + 13 * 1e-5)
    assert speed.attention == pytest.approx(3 * 2 * 4 * 32 * 2 * 100 / 1e9)
    assert speed.others == pytest.approx(3 * 8 * 256 * 2 / 1e9 + 3 * 5 * 1e-5 + 1e-3)
    assert speed.communication == 0
    assert speed.tokens_per_second == pytest.approx(1 / speed.seconds)


def test_a_prefill_computes_and_its_attention_is_a_triangle() -> None:
    load = Workload(2, 4000, ALL)
    speed = prefill_speed(decoder(), Sharing(), BF16, load, PLAIN, CLUSTER)
    weights = (512 + 256 + 1024) * 256 + 256 * 512
    assert speed.tokens == 8000
    head = 2 * (1000 * 256 + 2 * (256 + 1000)) / 1e9  # two rows: read, not computed
    computed = 3 * 2 * 8000 * weights / 1e10
    assert speed.matmuls == pytest.approx(computed + head + 13 * 1e-5)
    pairs = 2 * comb(4000, 2)
    assert speed.attention == pytest.approx(3 * pairs * 4 * 256 / 0.6e10, rel=1e-3)


def test_a_pass_reads_no_more_than_a_chunk() -> None:
    short = prefill_speed(decoder(), Sharing(), BF16, Workload(8, 1000, 500), PLAIN, CLUSTER)
    assert short.tokens == 500


def test_how_many_experts_a_batch_meets_is_the_mean_of_draws() -> None:
    """Of 5 experts and 2 for a token, all draws of two tokens counted out."""
    pairs = [(a, b) for a in range(5) for b in range(a)]
    drawn = [len({*first, *second}) for first in pairs for second in pairs]
    assert experts_read(5, 2, 2) == pytest.approx(sum(drawn) / len(drawn))
    assert experts_read(128, 8, 1) == pytest.approx(8)
    assert experts_read(128, 8, 4096) == pytest.approx(128)


def test_a_layer_of_experts_reads_those_that_its_tokens_meet() -> None:
    shape = decoder(MIXTRAL, num_hidden_layers=1)
    speeds = [decode_speed(shape, Sharing(), BF16, Workload(b, 1), PLAIN, CLUSTER) for b in (1, 2)]
    # The second token reads 2 * (1 - 2/8) experts more, of three matrices of 512 x 256 each.
    more = 1.5 * 3 * 512 * 256 * 2 / 1e9
    rows = 2 * 2 * ((256 + 512) + (512 + 256)) / 1e9  # of two experts
    others = 2 * ((256 + 512) + (256 + 256) + (256 + 8) + (256 + 1000)) / 1e9
    assert speeds[1].matmuls - speeds[0].matmuls == pytest.approx(more + rows + others)


def test_exchanges_by_hand() -> None:
    wire = PLAIN.link.bandwidth
    assert all_reduce_seconds(1e6, 1, PLAIN, CLUSTER) == 0
    # 6 steps of a quarter each
    within = 6 * 0.25e6 / wire + 6.6e-6 + 6e-6
    assert all_reduce_seconds(1e6, 4, PLAIN, CLUSTER) == pytest.approx(within)
    assert all_gather_seconds(1e6, 4, PLAIN, CLUSTER) == pytest.approx(within / 2)
    # Two machines: 14 steps of an eighth, through four ports of 8 MB/s; 2 of them leave a machine.
    across = 14 * 0.125e6 / 32e6 + 6.6e-6 + 12e-6 + 2 * 2.7e-6
    assert all_reduce_seconds(1e6, 8, PLAIN, CLUSTER) == pytest.approx(across)
    assert all_to_all_seconds(1e6, 4, PLAIN, CLUSTER) == pytest.approx(0.75e6 / wire + 7.6e-6)
    far = 0.5e6 / 8e6 + 6.6e-6 + 2.7e-6
    assert all_to_all_seconds(1e6, 8, PLAIN, CLUSTER) == pytest.approx(far)
    assert all_to_all_seconds(1e6, 1, PLAIN, CLUSTER) == 0


def test_a_replica_exchanges_twice_in_each_layer() -> None:
    load = Workload(4, 10)
    found = decode(load, sharing=Sharing(2)).communication
    state, logits = 4 * 256 * 2, 4 * 1000 * 2
    expected = 3 * 2 * all_reduce_seconds(state, 2, PLAIN, CLUSTER)
    assert found == pytest.approx(expected + all_gather_seconds(logits, 2, PLAIN, CLUSTER))
    # Two groups of one GPU attend to two sequences each: tokens go to 2 experts and come back.
    moe = decode_speed(decoder(MIXTRAL), Sharing(1, 2), INT4, load, PLAIN, CLUSTER)
    sent = 2 * 256 * 2 * 2
    assert moe.communication == pytest.approx(3 * 2 * all_to_all_seconds(sent, 2, PLAIN, CLUSTER))


def test_on_a_gpu_a_quantized_weight_takes_longer_than_the_roofline_allows() -> None:
    gpu = DEVICES["h200"]
    for matrix in matrices(read_decoder("llama-3-70b"), Sharing(4)):
        for form, rows in ((INT4, 1), (INT4, 64), (INT8, 4096), (BF16, 16)):
            spec = spec_of(matrix, rows, form, gpu)
            found, least = matmul_seconds(spec, gpu), ideal_seconds(spec, rows)
            assert least < found < 4 * least + 2e-5, (matrix.name, form.name, rows)


def test_few_rows_take_half_the_time_in_half_the_bits() -> None:
    """Llama-3-70B on two H200s: from 16 to 4 bits at least 2 and no more than 4 times faster."""
    llama, load = read_decoder("llama-3-70b"), Workload(1, 128)
    seconds = [
        decode_speed(llama, Sharing(2), form, load, DEVICES["h200"], Cluster()).matmuls
        for form in (BF16, INT8, INT4)
    ]
    assert 1.3 < seconds[0] / seconds[1] < 2
    assert 2 < seconds[0] / seconds[2] < 4


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 64), st.integers(1, 4000), st.sampled_from([BF16, INT8, INT4]))
def test_more_work_never_takes_less_time(batch: int, context: int, form: WeightFormat) -> None:
    step = decode(Workload(batch, context), form).seconds
    assert step <= decode(Workload(batch + 1, context), form).seconds
    assert step <= decode(Workload(batch, context + 1), form).seconds
    assert decode(Workload(batch, context), INT4).seconds <= step * (1 + 1e-9) or form is INT4
    sharing = Sharing(2)
    assert decode(Workload(batch, context), form, sharing).matmuls <= step


@given(st.integers(1, 256), st.integers(1, 8), st.integers(1, 300))
def test_experts_met_are_at_least_those_of_one_token(count: int, k: int, tokens: int) -> None:
    k = min(k, count)
    met = experts_read(count, k, tokens)
    assert k - 1e-9 <= met <= count + 1e-9
    assert met <= experts_read(count, k, tokens + 1) + 1e-9


def test_two_groups_of_two_gpus_share_experts_and_not_attention() -> None:
    """tp 2, ep 4: two GPUs attend to each half of the batch, and each of four has 2 experts."""
    shape, sharing = decoder(MIXTRAL, num_hidden_layers=1), Sharing(2, 4)
    parts = matmul_parts(shape, sharing, BF16, Rows(3, 3, 1, 3), PLAIN)
    seconds = {matrix.name: found for matrix, found in parts}
    # Six tokens send 12 rows to four GPUs, and meet this share of all experts.
    met = 2 * (1 - (6 / 8) ** 6)
    moved = met * 512 * 256 * 2 + 3 * (512 + 256) * 2
    assert seconds["experts down"] == pytest.approx(moved / 1e9 + 1e-5)
    moved = 512 // 2 * 256 * 2 + 3 * (512 // 2 + 256) * 2
    assert seconds["qkv"] == pytest.approx(moved / 1e9 + 1e-5)


def test_two_groups_of_two_gpus_exchange_tokens() -> None:
    shape, sharing, load = decoder(MIXTRAL), Sharing(2, 4), Workload(5, 10)
    speed = decode_speed(shape, sharing, BF16, load, PLAIN, CLUSTER)
    state = 3 * 256 * 2  # the larger group's three sequences
    layer = 2 * all_reduce_seconds(state, 2, PLAIN, CLUSTER)
    # A GPU sends half of them, each to two experts, and their results come back.
    layer += 2 * all_to_all_seconds(state / 2 * 2, 4, PLAIN, CLUSTER)
    logits = all_gather_seconds(3 * 1000 * 2, 2, PLAIN, CLUSTER)
    assert speed.communication == pytest.approx(3 * layer + logits)
    assert speed.tokens == 5


def test_groups_prefill_their_parts_at_once() -> None:
    shape, sharing = decoder(MIXTRAL), Sharing(2, 4)
    for load, tokens in ((Workload(5, 100, 200), 400), (Workload(5, 100, ALL), 500)):
        speed = prefill_speed(shape, sharing, BF16, load, PLAIN, CLUSTER)
        assert speed.tokens == tokens


def test_on_a_gpu_experts_that_are_not_met_are_not_read() -> None:
    gpu = DEVICES["h200"]
    shape = read_decoder("qwen3-235b-a22b")
    stack = next(m for m in matrices(shape, Sharing()) if m.name == "experts gate_up")
    for form in (INT4, BF16):
        spec = spec_of(stack, 64, form, gpu)
        few, many = (matmul_seconds(spec, gpu, hit) for hit in (8.0, 64.0))
        one = 3072 * 4096 * form.bits / 8 / gpu.bandwidth
        assert many - few > 25 * one, form.name
        # 56 experts; normal levels issue for 1.15 times as long as their bytes take, and a tenth of
        # what else an SM does is not hidden behind that.
        assert many - few < 1.5 * 56 * one, form.name
