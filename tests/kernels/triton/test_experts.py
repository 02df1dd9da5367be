"""The kernels of experts against fp64, in the interpreter, and on a GPU if there is one."""

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.template import Routing
from fqcompile.kernels.triton import launch
from fqcompile.kernels.triton.fragments import scales_of_an_expert, words_of_an_expert
from tests.kernels.triton.expert_oracle import ExpertCase, check, draw, run, stacked
from tests.kernels.triton.oracle import (
    ACTIVATIONS,
    BF16,
    COLUMN,
    CONVERSIONS,
    FLOATS,
    FORMATS,
    GROUPS,
    NARROW,
    SMALL,
    UNEVEN_GROUPS,
    Case,
    every_format,
    on_device,
    on_every_device,
    running,
)
from tests.kernels.triton.test_row_blocks import blocks_of
from tests.tiers import examples

ONE = Case(n=20, k=130)
GROUPED = ExpertCase(offsets=(3, 3, 8))
GATHERED = ExpertCase(ids=(2, -3, 1, 2), experts=3)
every_routing = pytest.mark.parametrize("case", [GROUPED, GATHERED], ids=["grouped", "gathered"])

# Of 16 rows to a block: none, one, all, as many as a block holds and one more, fewer than experts.
SPREADS = [
    (0,), (1,), (17,), (0, 0, 5), (5, 5, 5), (16, 32), (17, 17, 33, 34), (1, 34), (0, 16, 16, 16),
    (0,) * 8 + (1,), tuple(range(1, 12)), (33,) * 7, (2, 2, 2, 40, 41, 41),
]  # fmt: skip


@pytest.mark.few(13)
@on_every_device
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("offsets", SPREADS, ids=str)
def test_each_row_goes_to_its_expert(offsets: tuple[int, ...], tail: int, device: str) -> None:
    """And those beyond the last offset to none: they are not written."""
    if offsets[-1] + tail:
        case = ExpertCase(offsets, tail=tail, one=replace(ONE, bias=True))
        check(case, device)
        check(replace(case, one=replace(case.one, config=replace(SMALL, SPLIT_K=2))), device)


@pytest.mark.few(2)
@on_every_device
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_ids_name_experts_from_both_ends_or_none(
    index_dtype: torch.dtype, split_k: int, device: str
) -> None:
    """A row that names none is NaN, whatever the activation; the others do not notice."""
    far = 2**31 - 1 if index_dtype == torch.int32 else 2**62
    ids = (0, 4, -1, -5, 5, -6, 2, 2, far, -far)
    one = replace(ONE, config=replace(SMALL, SPLIT_K=split_k), bias=True)
    for act, gated in (("relu", False), ("swiglu_oai", True)):
        same = replace(one, activation=act, gated=gated)
        check(ExpertCase(ids=ids, experts=5, index_dtype=index_dtype, one=same), device)


@on_every_device
@pytest.mark.parametrize("offsets", [(5, 3, 8), (-4, 6, 8), (3, 30, 99), (9, 2, 1), (-9, -9, -1)])
@pytest.mark.parametrize("split_k", [1, 2])
def test_offsets_that_are_none_reach_no_other_memory(
    offsets: tuple[int, ...], split_k: int, device: str
) -> None:
    """They cannot be refused without waiting for the device; what comes out is not defined."""
    inputs = draw(GROUPED)
    weight, x = stacked(GROUPED, inputs, device), on_device(inputs.x, device)
    routing = Routing(offsets=torch.tensor(offsets, device=device))
    config = replace(SMALL, SPLIT_K=split_k)
    with running(device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "conversion", lambda device, dtype: "subnormal")
        for expert, first, end in blocks_of(torch.tensor(offsets, device=device), 8, 16):
            assert expert == 3 or (0 <= first <= 8 and end <= 8 and 0 <= expert < 3)
        if sorted(offsets) == list(offsets):  # else blocks share rows, which is a race
            launch.expert_gemm(x, weight, routing, Epilogue(), config, 2)


@on_every_device
@every_routing
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@every_format
def test_experts_are_right_for_every_type(
    bits: int,
    levels: str,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    case: ExpertCase,
    device: str,
) -> None:
    one = replace(ONE, bits=bits, levels=levels, dtype=dtype, scale_dtype=scale_dtype)
    check(replace(case, one=one), device)


@pytest.mark.few(8)
@on_every_device
@every_routing
@pytest.mark.parametrize("group_size", (*GROUPS, *UNEVEN_GROUPS))
def test_experts_are_right_for_every_group_size(
    group_size: int, case: ExpertCase, device: str
) -> None:
    """Each has its own stride between experts; 270 rows of scales are filled up to 512."""
    check(replace(case, one=replace(ONE, n=270, k=390, group_size=group_size)), device)


@on_every_device
@every_routing
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_experts_apply_every_epilogue(
    bias: bool, activation: str, case: ExpertCase, device: str
) -> None:
    one = Case(n=16, k=40, activation=activation, bias=bias)
    check(replace(case, one=one), device)
    check(replace(case, one=replace(one, gated=True, dtype=BF16)), device)
    check(replace(case, one=replace(one, gated=True, n=19)), device)
    check(replace(case, one=replace(one, config=replace(SMALL, SPLIT_K=2))), device)


@on_every_device
@every_routing
def test_experts_compute_the_same_bits_again(case: ExpertCase, device: str) -> None:
    case = replace(case, one=replace(ONE, gated=True, bias=True))
    inputs = draw(case)
    assert torch.equal(run(case, inputs, device), run(case, inputs, device))


@on_every_device
def test_both_routings_compute_the_same_bits(device: str) -> None:
    grouped = ExpertCase(offsets=(2, 2, 7), one=replace(ONE, bias=True))
    inputs = draw(grouped)
    gathered = ExpertCase(ids=(0, 0, -1, 2, 2, 2, -1), one=grouped.one)
    assert torch.equal(run(grouped, inputs, device), run(gathered, inputs, device))


@on_every_device
@every_routing
def test_experts_read_x_of_any_strides(case: ExpertCase, device: str) -> None:
    inputs = draw(case)
    want, x = run(case, inputs, device), inputs.x.contiguous()
    for view in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(run(case, replace(inputs, x=view), device), want)


READ = [
    (ExpertCase((0, 3, 3, 20, 20), tail=4, one=ONE), {1, 3}, 3),
    (ExpertCase(ids=(2, 4, -1), experts=5, one=ONE), {2, 4}, 3),
]


@pytest.mark.parametrize(("case", "hit", "blocks"), READ, ids=["grouped", "gathered"])
@pytest.mark.parametrize("split_k", [1, 2])
def test_only_what_has_rows_is_read(
    split_k: int, case: ExpertCase, hit: set[int], blocks: int
) -> None:
    """Of each expert with rows its two blocks of K, once for each block of rows; no other x."""
    inputs = draw(case)
    weight, reads = stacked(case, inputs), []
    config = replace(SMALL, SPLIT_K=split_k)
    with running("cpu") as memory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "conversion", lambda device, dtype: "subnormal")
        assert memory is not None
        touch = memory.touch

        def noted(access: object, addresses: np.ndarray, *rest: object) -> None:
            reads.append((rest[-1], addresses.astype(np.int64)))
            touch(access, addresses, *rest)

        patch.setattr(memory, "touch", noted)
        launch.expert_gemm(inputs.x, weight, case.routing(), Epilogue(), config, 2)
    words = [addresses for name, addresses in reads if name == "qweight_ptr"]
    assert len(words) == 2 * blocks
    of_expert = (np.concatenate(words) - weight.qweight.data_ptr()) // weight.qweight[0].nbytes
    assert set(of_expert.tolist()) == hit
    x = np.concatenate([addresses for name, addresses in reads if name == "x_ptr"])
    rows = (x - inputs.x.data_ptr()) // (2 * inputs.x.stride(0))
    assert set(rows.tolist()) == set(case.of_rows.ge(0).nonzero().flatten().tolist())


@triton.jit
def _begins_kernel(out_ptr, expert, rows, K, BITS: tl.constexpr):
    tl.store(out_ptr, expert * words_of_an_expert(rows, K, BITS, 128))
    tl.store(out_ptr + 1, expert * scales_of_an_expert(rows, K, 1, 16, 128))


@on_every_device
@pytest.mark.parametrize("bits", [4, 8])
def test_a_stack_may_be_larger_than_2_gib(bits: int, device: str) -> None:
    """Where the last of 512 experts of 28672 x 4096 begins: beyond int32, whatever the expert's."""
    out = torch.zeros(2, dtype=torch.int64, device=device)
    with running(device):
        _begins_kernel[(1,)](out, 511, 28672, 4096, bits)
    assert out.tolist() == [511 * 28672 * 4096 * bits // 32, 511 * 28672 * 4096 // 16]


@st.composite
def cases(draw: st.DrawFn) -> ExpertCase:
    gated = draw(st.booleans(), label="gated")
    widths = [64, 128] if gated else [64, 128, 256]
    bits, levels = draw(st.sampled_from(FORMATS), label="format")
    one = Case(
        n=draw(st.integers(1, 40) | st.sampled_from([64, 130, 300]), label="n"),
        k=draw(st.integers(1, 300) | st.sampled_from([384, 512, 700]), label="k"),
        bits=bits,
        levels=levels,
        group_size=draw(st.sampled_from([*GROUPS, 80, 112]), label="group_size"),
        dtype=draw(st.sampled_from(NARROW), label="dtype"),
        scale_dtype=draw(st.sampled_from(FLOATS), label="scale_dtype"),
        scales=draw(st.sampled_from(["normal", "some zero", "denormal"]), label="scales"),
        bias=draw(st.booleans(), label="bias"),
        activation=draw(st.sampled_from(ACTIVATIONS), label="activation"),
        gated=gated,
        kwidth=draw(st.sampled_from([2, 4]), label="kwidth"),
        conversion=draw(st.sampled_from(CONVERSIONS), label="conversion"),
        config=TileConfig(
            BLOCK_M=draw(st.sampled_from([16, 16, 32, 64]), label="BLOCK_M"),
            BLOCK_N=draw(st.sampled_from(widths), label="BLOCK_N"),
            BLOCK_K=128,
            SPLIT_K=draw(st.sampled_from([1, 1, 2, 4, 8]), label="SPLIT_K"),
        ),
        seed=draw(st.integers(0, 9), label="seed"),
    )
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]), label="index dtype")
    experts = draw(st.integers(1, 9), label="experts")
    if draw(st.booleans(), label="gathered"):
        ids = draw(st.lists(st.integers(-experts - 1, experts), min_size=1, max_size=7))
        return ExpertCase(None, tuple(ids), experts, index_dtype=index_dtype, one=one)
    few, most = st.integers(0, 2), st.integers(0, 40)
    rows = draw(st.lists(st.sampled_from([0, 1]) | few, min_size=experts, max_size=experts))
    rows[draw(st.integers(0, experts - 1))] = draw(most, label="rows of one")
    tail = draw(st.integers(0 if sum(rows) else 1, 5), label="tail")
    return ExpertCase(tuple(accumulate(rows)), tail=tail, index_dtype=index_dtype, one=one)


@on_every_device
@settings(max_examples=examples(25), deadline=None)
@given(case=cases())
def test_experts_are_right_for_any_case(case: ExpertCase, device: str) -> None:
    check(case, device)


@on_every_device
@every_routing
def test_every_expert_of_many_is_found(case: ExpertCase, device: str) -> None:
    """300 experts, no power of two; one row for every fifth, and one expert with twenty."""
    rows = [int(e % 5 == 0) for e in range(300)]
    rows[151] = 20
    one = Case(n=3, k=17, group_size=COLUMN, bias=True)
    if case.ids is None:
        check(ExpertCase(tuple(accumulate(rows)), one=one), device)
    else:
        check(ExpertCase(ids=(0, 151, 299, -1, -300, 256), experts=300, one=one), device)
