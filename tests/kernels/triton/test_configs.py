"""Configurations: which there are, which fit, what the model picks, and where dense takes over."""

from dataclasses import replace
from functools import partial
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.roofline import M, dense, ideal_seconds
from fqcompile.kernels.spec import A100, DENSE, H200, GemmSpec, TileConfig
from fqcompile.kernels.triton.configs import _is_unshapely, candidates, launches
from fqcompile.kernels.triton.cost import cost
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
    for unshapely, some in groupby(full, partial(_is_unshapely, spec)):
        times = [seconds(spec, config, spec.m) for config in some]
        assert times == sorted(times), unshapely
    assert len(list(groupby(full, partial(_is_unshapely, spec)))) <= 2
    for config in full:
        if isinstance(config, TileConfig):
            assert config.BLOCK_K == 128
            assert config.BLOCK_M == 16 or 2 * spec.m > config.BLOCK_M
            assert config.SPLIT_K == 1 or -(-spec.k // 128) >= 4 * config.SPLIT_K


@given(spec=specs, low=st.integers(1, 3000), span=st.none() | st.integers(0, 3000))
@settings(max_examples=examples(20), deadline=None)
def test_open_rows_get_at_most_three_kernels(spec: GemmSpec, low: int, span: int | None) -> None:
    high = None if span is None else low + span
    table = launches(replace(spec, m_range=(low, high)))
    assert len(table.steps) <= 3
    bounds = [bound for bound, _ in table.steps if bound is not None]
    assert all(low <= bound and (high is None or bound < high) for bound in bounds)
    for bound in bounds:
        assert isinstance(table.at(bound), TileConfig)


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


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
def test_dense_takes_over_where_the_model_says_so(gpu) -> None:
    """The bound is solved from the steady model; near it the two times are close."""
    spec = replace(SPEC, gpu=gpu, m_range=(1, None))
    (_, _), (bound, config), (_, last) = launches(spec).steps
    assert last is DENSE
    assert bound is not None
    assert seconds(spec, config, bound) == pytest.approx(seconds(spec, DENSE, bound), rel=0.1)
    assert candidates(spec, 4 * bound, "max")[0] is DENSE
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
