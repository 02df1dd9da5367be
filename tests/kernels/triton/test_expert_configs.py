"""Configurations of experts: which there are, what the model makes of routing, where dense is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.roofline import M, dense, experts_hit, ideal_seconds, weight_bytes
from fqcompile.kernels.spec import A100, DENSE, H200, GemmSpec, TileConfig
from fqcompile.kernels.triton.configs import candidates, launches, offers_dense
from fqcompile.kernels.triton.cost import _tiles, cost, mean_experts_hit
from fqcompile.kernels.triton.launch import has_two_sums
from fqcompile.kernels.tuning.launches import steps_in_range
from tests.kernels.triton.test_configs import loss_in_step
from tests.kernels.triton.test_row_blocks import counted
from tests.tiers import examples

BF16 = torch.bfloat16
QWEN = GemmSpec(
    8, 768, 2048, 4, 128, BF16, BF16, "cuda", "silu", True, gpu=H200, experts=128, routing="grouped"
)
GATHERED = replace(QWEN, routing="gathered")
specs = st.builds(
    GemmSpec,
    m=st.integers(1, 50000),
    n=st.integers(1, 3000).map(lambda n: 8 * n),
    k=st.integers(1, 2000).map(lambda k: 8 * k),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([16, 32, 64, 128, 1 << 20]),
    dtype=st.sampled_from([torch.float16, BF16]),
    scale_dtype=st.just(BF16),
    device_type=st.just("cuda"),
    gated=st.booleans(),
    gpu=st.sampled_from([H200, A100]),
    experts=st.sampled_from([1, 2, 8, 60, 128, 512]),
    routing=st.sampled_from(["grouped", "gathered"]),
)


@given(spec=specs)
@settings(max_examples=examples(20), deadline=None)
def test_every_candidate_is_of_its_routing_and_the_first_is_chosen(spec: GemmSpec) -> None:
    fast, full = (candidates(spec, spec.m, mode) for mode in ("fast", "max"))
    assert len(fast) <= 12
    assert set(fast) <= set(full)
    assert fast[0] == full[0] == launches(spec).at(spec.m)
    gathered = spec.routing == "gathered" and spec.m <= 2 * spec.experts
    fast_path = spec.gpu == H200 and spec.dtype == BF16 and not gathered
    small = spec.experts * spec.weight_rows * spec.k * 2 <= 2 << 30
    assert (DENSE in full) == (fast_path and small and spec.m > 16)
    tiles = [config for config in full if isinstance(config, TileConfig)]
    assert tiles
    if gathered:
        assert {config.BLOCK_M for config in tiles} == {16}
    mean = spec.m / mean_experts_hit(spec, spec.m)
    assert all(config.BLOCK_M == 16 or 2 * mean + 1 > config.BLOCK_M / 2 for config in tiles)


@given(spec=specs, low=st.integers(1, 3000), span=st.none() | st.integers(0, 30000))
@settings(max_examples=examples(20), deadline=None)
def test_open_rows_have_steps_within_their_range(
    spec: GemmSpec, low: int, span: int | None
) -> None:
    high = None if span is None else low + span
    spec = replace(spec, m_range=(low, high))
    table = launches(spec)
    bounds = [bound for bound, _ in table.steps if bound is not None]
    assert all(low <= bound and (high is None or bound < high) for bound in bounds)
    assert [config for _, _, config in steps_in_range(spec, table)] == [c for _, c in table.steps]


def test_grouped_rows_have_a_step_where_a_tile_of_16_holds_an_experts_rows() -> None:
    """A step less would run 8 rows an expert in the tile for many."""
    table = launches(replace(QWEN, m_range=(1, None)))
    assert 128 * 8 in [bound for bound, _ in table.steps]
    for m in (8, 1024):
        config = table.at(m)
        assert isinstance(config, TileConfig)
        assert config.BLOCK_M == 16
    many = table.at(2049)
    assert isinstance(many, TileConfig) and many.BLOCK_M > 16


def test_many_gathered_rows_run_as_grouped_ones() -> None:
    """From there on each expert is read once, as if the rows had come sorted."""
    gathered, grouped = (launches(replace(s, m_range=(257, None))) for s in (GATHERED, QWEN))
    for m in (257, 1 << 20):
        assert gathered.at(m) == grouped.at(m)
    mixtral = replace(GATHERED, experts=8, n=14336, k=4096)
    config = TileConfig(16, 64, 128, 1, 4, 4)
    before, after = (cost(mixtral, config, H200, m).seconds for m in (16, 17))
    assert after < 0.7 * before


@pytest.mark.parametrize("experts", [1, 2, 8, 128])
@pytest.mark.parametrize("m", [1, 2, 8, 128, 2000])
def test_the_mean_of_experts_hit_is_that_of_drawing_them(m: int, experts: int) -> None:
    spec = replace(QWEN, experts=experts)
    found = float(experts_hit(spec).subs(M, m))
    assert found == pytest.approx(mean_experts_hit(spec, m))
    torch.manual_seed(0)
    drawn = torch.randint(experts, (400, m))
    hit = sum(row.unique().numel() for row in drawn) / 400
    assert found == pytest.approx(hit, rel=0.03)


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("m", [1, 8, 128, 700, 2048, 5000, 32768])
def test_the_tiles_of_grouped_rows_are_those_of_counted_blocks(m: int, block_m: int) -> None:
    """Drawn at random: within an eighth, though no tile's filling is known."""
    torch.manual_seed(0)
    tiles = 0
    for _ in range(20):
        rows = torch.bincount(torch.randint(128, (m,)), minlength=128)
        tiles += len(counted(tuple(rows.cumsum(0).tolist()), block_m))
    hit = mean_experts_hit(QWEN, m)
    model = _tiles(QWEN, TileConfig(block_m, 64, 128), m, hit)
    assert model == pytest.approx(tiles / 20, rel=0.13)
    assert model >= hit


def test_the_ideal_is_to_read_what_was_hit() -> None:
    one = weight_bytes(QWEN)
    assert one == weight_bytes(replace(QWEN, experts=0, routing=None))
    moved = 2 * (2048 + 768)
    assert ideal_seconds(QWEN, 1) == pytest.approx((one + moved) / H200.bandwidth)
    many = (128 * one + 5000 * moved) / H200.bandwidth
    assert ideal_seconds(QWEN, 5000) == pytest.approx(many, rel=1e-6)


def seconds(spec: GemmSpec, config: object, m: int) -> float:
    assert spec.gpu is not None
    if isinstance(config, TileConfig):
        return cost(spec, config, spec.gpu, m).seconds
    return float(dense(spec, spec.gpu).subs(M, m))


def test_gathering_rereads_what_grouping_reads_once_but_looks_for_no_expert() -> None:
    config = TileConfig(16, 64, 128, 1, 4, 4)
    few = [seconds(spec, config, 1) for spec in (GATHERED, QWEN)]
    many = [seconds(spec, config, 256) for spec in (GATHERED, QWEN)]
    assert few[0] < few[1]
    assert many[0] > 1.1 * many[1]


@pytest.mark.parametrize("spec", [QWEN, replace(QWEN, experts=8, n=14336, k=4096)], ids=str)
def test_dense_takes_over_where_the_model_says_so(spec: GemmSpec) -> None:
    *_, (bound, config), (_, last) = launches(replace(spec, m_range=(1, None))).steps
    assert last is DENSE
    assert bound is not None
    assert loss_in_step(spec, config, bound) <= loss_in_step(spec, DENSE, bound)
    assert candidates(spec, 4 * bound, "max")[0] is DENSE
    assert candidates(spec, bound // 4, "max")[0] is not DENSE


def test_dense_is_offered_where_pytorch_has_a_fast_path_alone() -> None:
    assert offers_dense(QWEN)
    others = [GATHERED, replace(QWEN, dtype=torch.float16), replace(QWEN, gpu=A100)]
    others += [replace(QWEN, k=2044), replace(QWEN, n=766)]
    assert not any(map(offers_dense, others))
    assert offers_dense(replace(QWEN, experts=0, routing=None, gpu=A100))
    arches = {"sm_90": True, "sm_100": True, "sm_103": True, "sm_110": False, "sm_120": False}
    for arch, fast in arches.items():
        assert offers_dense(replace(QWEN, gpu=replace(H200, arch=arch))) is fast, arch
    assert launches(replace(QWEN, gpu=A100, m_range=(4096, None))).at(1 << 20) is not DENSE


@pytest.mark.parametrize(
    ("experts", "n", "k", "gib"), [(8, 14336, 4096, 1.75), (128, 2880, 2880, 3.96)]
)
def test_a_stack_whose_dense_form_is_large_stays_packed(
    experts: int, n: int, k: int, gib: float
) -> None:
    """Mixtral's gate and up may be dequantized, those of GPT-OSS 120B may not."""
    spec = replace(QWEN, experts=experts, n=n, k=k, m_range=(1, None))
    assert experts * 2 * n * k * 2 / 2**30 == pytest.approx(gib, rel=0.01)
    assert offers_dense(spec) is (gib < 2)
    assert (launches(spec).at(1 << 20) is DENSE) is (gib < 2)


@pytest.mark.parametrize("spec", [QWEN, GATHERED], ids=["grouped", "gathered"])
def test_a_single_token_fills_the_gpu(spec: GemmSpec) -> None:
    config = candidates(spec, 8, "fast")[0]
    assert isinstance(config, TileConfig)
    sums = 2 if has_two_sums(spec.n, config) else 1
    programs = 8 * spec.weight_rows // (sums * config.BLOCK_N) * config.SPLIT_K
    assert programs >= H200.num_sms / 2
