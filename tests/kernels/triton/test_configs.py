"""Configurations: which there are, which fit, what the model picks, and where dense takes over."""

from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from bench.core.shapes import SERVED, SERVED_EXPERTS, expert_spec
from fqcompile.kernels.roofline import LAUNCH_SECONDS, M, dense, ideal, ideal_seconds
from fqcompile.kernels.spec import A100, DENSE, H200, GemmSpec, TileConfig
from fqcompile.kernels.triton.configs import (
    ANY_ROWS,
    _bounds,
    _fitting,
    _is_unshapely,
    candidates,
    launches,
)
from fqcompile.kernels.triton.cost import cost
from fqcompile.kernels.triton.template import TRITON_GEMMS
from fqcompile.tensor.format import NORMAL, UNIFORM
from tests.tiers import examples

BF16 = torch.bfloat16
SPEC = GemmSpec(1, 8192, 8192, 4, 128, BF16, BF16, "cuda", gpu=H200)
specs = st.builds(
    GemmSpec,
    m=st.integers(1, 5000),
    n=st.integers(1, 40000),
    k=st.integers(1, 40000),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([16, 32, 48, 64, 128, 256, 1 << 20]),
    dtype=st.sampled_from([torch.float16, BF16]),
    scale_dtype=st.just(BF16),
    device_type=st.just("cuda"),
    gated=st.booleans(),
    gpu=st.sampled_from([H200, A100]),
)


def seconds(spec: GemmSpec, config: object, m: int) -> float:
    assert spec.gpu is not None
    if isinstance(config, TileConfig):
        return cost(spec, config, spec.gpu, m).seconds
    return float(dense(spec, spec.gpu).subs(M, m))


@given(spec=specs)
@settings(max_examples=examples(20), deadline=None)
def test_every_candidate_fits_and_none_is_faster_than_the_first(spec: GemmSpec) -> None:
    fast, full = (candidates(spec, spec.m, mode) for mode in ("fast", "max"))
    assert len(fast) <= 12
    assert set(fast) <= set(full)
    assert len(set(full)) == len(full)
    assert fast[0] == full[0]
    assert launches(spec).at(spec.m) == fast[0]
    assert seconds(spec, full[0], spec.m) > ideal_seconds(spec, spec.m)
    unshapely_here = partial(_is_unshapely, spec, m=spec.m)
    for unshapely, some in groupby(full, unshapely_here):
        times = [seconds(spec, config, spec.m) for config in some]
        assert times == sorted(times), unshapely
    assert len(list(groupby(full, unshapely_here))) <= 2
    for config in full:
        if isinstance(config, TileConfig):
            assert config.BLOCK_K == 128
            assert config.BLOCK_M == 16 or 2 * spec.m > config.BLOCK_M
            assert config.SPLIT_K == 1 or -(-spec.k // 128) >= 4 * config.SPLIT_K


@given(spec=specs, low=st.integers(0, 3000), span=st.none() | st.integers(0, 3000))
@example(spec=SPEC, low=0, span=None)
@example(spec=SPEC, low=0, span=0)
@settings(max_examples=examples(20), deadline=None)
def test_open_rows_have_steps_within_their_range(
    spec: GemmSpec, low: int, span: int | None
) -> None:
    high = None if span is None else low + span
    table = launches(replace(spec, m_range=(low, high)))
    bounds = [bound for bound, _ in table.steps if bound is not None]
    assert all(low <= bound and (high is None or bound < high) for bound in bounds)
    assert all(before != after for (_, before), (_, after) in pairwise(table.steps))
    for begin, bound in zip([low, *(bound + 1 for bound in bounds)], bounds, strict=False):
        both = [candidates(spec, m, "max") for m in (begin, bound)]
        assert all(table.at(bound) in found for found in both)
        if both[0][0] == both[1][0]:
            assert table.at(bound) == both[0][0]


LAYERS = [
    GemmSpec(1, n, k, 4, 128, BF16, BF16, "cuda", "silu" if gated else "none", gated, gpu=H200)
    for shapes in SERVED.values()
    for n, k, gated in shapes
]
EXPERTS = [
    expert_spec(shape, matrix, routing, 1, 4, 128, BF16, H200)
    for shape in SERVED_EXPERTS.values()
    for matrix in ("gate_up", "down")
    for routing in ("grouped", "gathered")
]
# Between a full tile and the next row the best configuration changes, and in between hardly.
ROWS = [m for full in range(16, 513, 16) for m in (full // 2, full - 1, full, full + 1)]


@pytest.mark.few(4)
@pytest.mark.parametrize("levels", [NORMAL, UNIFORM])
@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("spec", LAYERS + EXPERTS, ids=str)
def test_open_rows_lose_little_to_the_best_of_each_number(spec, gpu, levels: str) -> None:
    """By the model at most .3 of the time; and wherever what is taken for a known number is faster
    than the least time of 16 bits, which are not dequantized, so is this, but for less than a
    launch takes. What is taken for a known number is no tile of a bad shape, which the model takes
    for faster than it is."""
    spec = replace(spec, gpu=gpu, levels=levels)
    table = launches(replace(spec, m_range=(1, None)))
    for m in sorted({1, 2, 3, 4, 5, 6, 8, 12, *ROWS}):
        known = [seconds(spec, config, m) for config in candidates(spec, m, "max")]
        taken = seconds(spec, table.at(m), m)
        assert taken <= 1.3 * min(known), (m, table.at(m))
        floor = float(ideal(replace(spec, bits=16), gpu).subs(M, m))
        assert taken <= floor or known[0] > floor - LAUNCH_SECONDS, m


def test_an_sm_that_has_a_program_more_than_others_is_waited_for() -> None:
    """160 tiles on 132 SMs take as long as 264, where products are the limit."""
    config = TileConfig(128, 128, 128, 1, 8, 3)
    form = replace(SPEC, group_size=SPEC.k)
    once, more, twice = (
        cost(replace(form, n=128 * tiles), config, H200, 128).seconds for tiles in (132, 160, 264)
    )
    assert more == pytest.approx(twice, rel=0.05)
    assert more > 1.3 * once


def test_narrow_tiles_give_idle_sms_a_program() -> None:
    """What a rank of 8 has of Llama 70B's output: wide tiles are 64 programs."""
    spec = replace(SPEC, n=8192, k=1024)
    config = candidates(spec, 1, "fast")[0]
    wide = TileConfig(16, 128, 128, 1, 4, 4)
    assert cost(spec, config, H200, 1).programs >= 2 * cost(spec, wide, H200, 1).programs
    assert seconds(spec, config, 1) == min(seconds(spec, c, 1) for c in candidates(spec, 1, "max"))
    assert seconds(spec, config, 1) < 0.9 * seconds(spec, wide, 1)


@pytest.mark.parametrize("m", [1, 16])
def test_gated_groups_of_32_are_given_no_tile_that_spills(m: int) -> None:
    """On an A100 16 x 64 of both does: its machine code has 5 spills around the loop."""
    spec = replace(SPEC, n=14336, k=4096, group_size=32, gated=True, gpu=A100, levels=NORMAL)
    found = candidates(spec, m, "max")
    tiles = [(c.BLOCK_M, c.BLOCK_N, c.SPLIT_K, c.num_warps) for c in found if c is not DENSE]
    assert (16, 64, 1, 4) not in tiles
    assert (16, 64, 1, 4) in [
        (c.BLOCK_M, c.BLOCK_N, c.SPLIT_K, c.num_warps)
        for c in candidates(replace(spec, levels=UNIFORM), m, "max")
        if c is not DENSE
    ]


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, 8192)])
def test_few_rows_split_k_until_the_gpu_is_full(m: int, gpu, bits: int, group_size: int) -> None:
    spec = replace(SPEC, gpu=gpu, bits=bits, group_size=group_size, n=4096)
    config = candidates(spec, m, "fast")[0]
    assert isinstance(config, TileConfig)
    assert config.BLOCK_M == 16
    programs = -(-spec.n // config.BLOCK_N) * config.SPLIT_K
    assert programs >= gpu.num_sms / 2


def ends(spec: GemmSpec, mode: str = "max") -> set[bool]:
    """How the candidates for the spec's M finish where K is split."""
    found = candidates(spec, spec.m, mode)
    return {c.last_finishes for c in found if c is not DENSE and c.SPLIT_K > 1}


@pytest.mark.parametrize("mode", ["fast", "max"])
@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("m", [1, 16])
def test_both_ways_to_finish_are_offered(m: int, gpu, mode: str) -> None:
    for n, gated in ((4096, False), (4096, True)):
        assert ends(replace(SPEC, m=m, n=n, gated=gated, gpu=gpu), mode) == {False, True}


def test_the_last_program_finishes_only_where_it_can() -> None:
    """It has gate and up both or not at all; the order in which AMD's memory is written is not
    proven."""
    assert ends(replace(SPEC, n=4095, gated=True)) == {False}
    assert ends(replace(SPEC, n=4095)) == {False, True}
    assert ends(replace(SPEC, gpu=replace(H200, arch="gfx942"))) == {False}
    for config in candidates(replace(SPEC, n=4096, gated=True), 1, "max"):
        assert config is DENSE or not config.last_finishes or config.BLOCK_N <= 128


def of_the_two(spec: GemmSpec, text: str, m: int) -> tuple[float, float]:
    """Microseconds with the finishing kernel, and with the last program."""
    kernel = TileConfig.parse(text)
    last = replace(kernel, last_finishes=True)
    return 1e6 * seconds(spec, kernel, m), 1e6 * seconds(spec, last, m)


def test_the_last_program_saves_a_launch_where_tiles_are_small() -> None:
    kernel, last = of_the_two(replace(SPEC, n=4096), "16x128x128x8w4s4", 1)
    assert 0.5 < kernel - last < 1e6 * LAUNCH_SECONDS


def test_the_last_program_is_slow_where_a_tile_has_many_shares_of_many_rows() -> None:
    """32 shares of 64 x 128 are 1 MiB for one SM, which reads 65 GB/s from the L2 cache."""
    kernel, last = of_the_two(replace(SPEC, n=1024), "64x128x128x8w8s3", 64)
    assert last > kernel + 1
    kernel, last = of_the_two(replace(SPEC, n=1024), "16x64x128x2w4s3", 1)
    assert last < kernel


def loss_in_step(spec: GemmSpec, config: object, bound: int) -> float:
    """How many times as long it takes as the best, at the worse of the ends of the step to `bound`
    rows."""
    ends = max(b for b in _bounds(spec) if b < bound) + 1, bound
    best = [min(seconds(spec, c, m) for c in candidates(spec, m, "max")) for m in ends]
    return max(seconds(spec, config, m) / least for m, least in zip(ends, best, strict=True))


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
def test_dense_takes_over_where_the_model_says_so(gpu) -> None:
    spec = replace(SPEC, gpu=gpu, m_range=(1, None))
    *_, (bound, config), (_, last) = launches(spec).steps
    assert last is DENSE
    assert bound is not None
    assert loss_in_step(spec, config, bound) <= loss_in_step(spec, DENSE, bound)
    assert candidates(spec, 2 * bound, "max")[0] is DENSE
    assert candidates(spec, bound // 4, "max")[0] is not DENSE


def test_rows_that_stay_few_need_one_kernel() -> None:
    (step,) = launches(replace(SPEC, m_range=(1, 16))).steps
    assert step == (None, candidates(SPEC, 16, "max")[0])


def test_rows_that_are_always_many_are_dense() -> None:
    assert launches(replace(SPEC, m_range=(4096, None))).steps == ((None, DENSE),)


def test_a_gate_beside_its_up_takes_twice_the_accumulators() -> None:
    config = TileConfig(16, 64, 128)
    plain = cost(replace(SPEC, n=4096), config, H200, 1)
    gated = cost(replace(SPEC, n=4096, gated=True), config, H200, 1)
    split = cost(replace(SPEC, n=4096, gated=True), replace(config, SPLIT_K=2), H200, 1)
    assert gated.registers > plain.registers
    assert split.registers == plain.registers


@pytest.mark.parametrize("gpu", [H200, A100, replace(H200, shared_bytes=63 << 10)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, 1 << 20])
def test_open_rows_have_kernels_on_every_gpu(gpu, gated: bool, group_size: int) -> None:
    spec = replace(SPEC, n=14336, k=4096, gated=gated, group_size=group_size, gpu=gpu)
    table = launches(replace(spec, m_range=(2, None)))
    assert isinstance(table.at(2), TileConfig)
    assert table.at(1 << 20) is DENSE
    assert isinstance(launches(replace(spec, m=0)).at(0), TileConfig)


@given(
    spec=specs,
    levels=st.sampled_from([NORMAL, UNIFORM]),
    experts=st.sampled_from([0, 8]),
    kib=st.integers(16, 99),
)
@settings(max_examples=examples(60), deadline=None)
def test_a_gpu_whose_shared_memory_holds_no_program_is_refused_and_any_other_has_kernels(
    spec: GemmSpec, levels: str, experts: int, kib: int
) -> None:
    """Experts are not dequantized on an A100: without this, there would be nothing to choose."""
    assert spec.gpu is not None
    gpu = replace(spec.gpu, shared_bytes=kib << 10)
    routing = "grouped" if experts else None
    levels = levels if spec.bits == 4 else UNIFORM
    spec = replace(spec, gpu=gpu, levels=levels, experts=experts, routing=routing)
    (template,) = (one for one in TRITON_GEMMS if "packs for" not in str(one.refuse(spec)))
    reason = template.refuse(spec)
    if reason is None:
        assert next(_fitting(spec, gpu, spec.m), None) is not None
        assert cost(spec, ANY_ROWS, gpu, 1).shared_bytes <= gpu.shared_bytes
    assert kib < 63 or "shared memory" not in str(reason)  # 63: what AMD's GPUs have
