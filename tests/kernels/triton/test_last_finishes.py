"""Shares that the last program of a tile adds: the bits of the finishing kernel, in whatever order
programs arrive, launch after launch and beside another; and whose counters they count on."""

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from bench.static import sass
from bench.static.expert_launches import layer, routed
from bench.static.launches import GPUS, gemm, spec
from bench.static.machine_code import toolchain_missing
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.triton import arrivals, launch
from tests.kernels.triton import expert_oracle as experts
from tests.kernels.triton.expert_oracle import ExpertCase
from tests.kernels.triton.interpreter import together
from tests.kernels.triton.interpreter_memory import RaceError
from tests.kernels.triton.oracle import (
    ACTIVATIONS,
    BF16,
    COLUMN,
    NARROW,
    SMALL,
    Case,
    assert_close,
    draw,
    every_format,
    no_gpu,
    on_device,
    on_every_device,
    packed,
    run,
    running,
)
from tests.kernels.triton.test_gemm import cases
from tests.tiers import examples

LAST = replace(SMALL, SPLIT_K=4, last_finishes=True)
EVERYTHING = Case(m=17, n=48, k=600, bias=True, residual=True, activation="silu", config=LAST)
GATED = replace(EVERYTHING, gated=True, dtype=BF16)
ROUTINGS = [
    ExpertCase((0, 3, 3, 20), tail=2, one=Case(n=20, k=600, bias=True, config=LAST)),
    ExpertCase(ids=(2, 0, -1, 7, 2), one=Case(n=32, k=600, gated=True, bias=True, config=LAST)),
]
orders = pytest.mark.parametrize("order", range(4))


def by_a_kernel(case: Case) -> Case:
    return replace(case, config=replace(case.config, last_finishes=False))


def assert_nobody_is_counted() -> None:
    for own in arrivals._of_device.values():
        for made in own.made:
            assert made.is_meta or not made.any()


def check(case: Case, device: str, order: int | None = None) -> None:
    inputs = draw(case)
    y = run(case, inputs, device, order)
    other = run(by_a_kernel(case), inputs, device)
    assert torch.equal(y.view(torch.int16), other.view(torch.int16))
    assert_close(case, inputs, y)
    assert_nobody_is_counted()


@on_every_device
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@every_format
def test_the_bits_are_those_of_the_finishing_kernel(
    bits: int, levels: str, dtype: torch.dtype, device: str
) -> None:
    for case in (EVERYTHING, GATED, replace(EVERYTHING, m=1, n=19, group_size=COLUMN)):
        check(replace(case, bits=bits, levels=levels, dtype=dtype), device)


@on_every_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue_follows(activation: str, device: str) -> None:
    for case in (EVERYTHING, GATED, replace(EVERYTHING, bias=False, residual=False)):
        check(replace(case, m=3, activation=activation), device)


@on_every_device
@pytest.mark.parametrize("split_k", [2, 8, 64])
@pytest.mark.parametrize("k", [100, 700])
def test_short_and_empty_shares_are_counted(k: int, split_k: int, device: str) -> None:
    check(replace(EVERYTHING, k=k, config=replace(LAST, SPLIT_K=split_k)), device)


@on_every_device
@settings(max_examples=examples(12), deadline=None)
@given(case=cases(), order=st.integers(0, 99))
def test_any_case_has_the_same_bits(case: Case, order: int, device: str) -> None:
    """Also where gate and up have no accumulator each: then the kernel finishes after all."""
    split = max(2, case.config.SPLIT_K)
    config = replace(case.config, SPLIT_K=split, last_finishes=True)
    check(replace(case, m=max(1, case.m), config=config), device, order)


@orders
@pytest.mark.parametrize("case", [EVERYTHING, GATED], ids=["plain", "gated"])
def test_any_order_of_arrival_gives_the_same_bits(case: Case, order: int) -> None:
    check(case, "cpu", order)


@on_every_device
@pytest.mark.parametrize("order", [None, 0, 1])
@pytest.mark.parametrize("case", ROUTINGS, ids=["grouped", "gathered"])
def test_experts_have_the_same_bits(case: ExpertCase, order: int | None, device: str) -> None:
    """Blocks without an expert count nobody in; rows whose id names none are NaN."""
    inputs = experts.draw(case)
    y = experts.run(case, inputs, device, order)
    other = experts.run(replace(case, one=by_a_kernel(case.one)), inputs, device)
    rows = slice(None, case.m - case.tail if case.ids is None else None)
    assert torch.equal(y[rows].view(torch.int16), other[rows].view(torch.int16))
    experts.assert_close(case, inputs, y)
    assert_nobody_is_counted()


def call(case: Case, device: str = "cpu") -> tuple[Tensor, ...]:
    """y of one launch, which may wait for others, and what the finishing kernel computes."""
    inputs = draw(case)
    weight = packed(inputs.codes, inputs.scale, case.bits, case.group_size, 2, device, case.levels)
    x, bias, residual = (on_device(t, device) for t in (inputs.x, inputs.bias, inputs.residual))
    epilogue = Epilogue(bias, residual, case.activation, case.gated)
    return launch.dequant_gemm(x, weight, epilogue, case.config, 2)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "conversion", lambda device, dtype: "subnormal")


TWO = (EVERYTHING, replace(GATED, seed=1, config=replace(LAST, SPLIT_K=2)))


@orders
@pytest.mark.usefixtures("emulated")
def test_launches_one_after_the_other_count_on_the_same(order: int) -> None:
    """Of unlike shapes and numbers of shares, in one stream."""
    want = [run(by_a_kernel(case), draw(case)) for case in TWO]
    with running("cpu", order):
        for _ in range(3):
            for case, expected in zip(TWO, want, strict=True):
                assert torch.equal(call(case), expected)
    assert_nobody_is_counted()


@orders
@pytest.mark.usefixtures("emulated")
def test_launches_on_two_streams_do_not_disturb_each_other(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [run(by_a_kernel(case), draw(case)) for case in TWO]
    own = (torch.zeros(32, dtype=torch.int32) for _ in range(4))
    monkeypatch.setattr(arrivals, "counters", lambda x, number: next(own))
    with running("cpu", order) as memory:
        for _ in range(2):
            with together(memory):
                got = [call(case) for case in TWO]
            for y, expected in zip(got, want, strict=True):
                assert torch.equal(y, expected)


@pytest.mark.usefixtures("emulated")
def test_launches_that_ran_together_on_the_same_counters_would_be_wrong() -> None:
    """What the rules of `arrivals` are for: the checks here see it."""
    case = replace(EVERYTHING, m=5, n=20)
    want = run(by_a_kernel(case), draw(case))

    def disturbed(order: int) -> bool:
        arrivals._of_device.clear()
        try:
            with running("cpu", order) as memory, together(memory):
                got = [call(case), call(case)]
        except RaceError:
            return True
        return not all(torch.equal(y, want) for y in got)

    assert any(disturbed(order) for order in range(8))
    arrivals._of_device.clear()


# What the hardware is told. PTX has the program's order; in SASS a fence is an instruction.

DOWN = layer("qwen3-30b-a3b", "down", "grouped")
SHARES = replace(TileConfig(16, 128, 128, 8, 4, 4), last_finishes=True)
ORDERED = re.compile(
    r"(?P<shares>(?:st\.global\S* )+)bar\.sync "
    r"atom\.global\.gpu\.acq_rel\.add\.u32 st\.shared\S* bar\.sync ld\.shared\S* "
    r"st\.global\S* (?P<loads>(?:ld\.global\S* )+)"
)
IN_ORDER = ("STG", "BAR", "MEMBAR", "ATOMG", "CCTL", "LDG")


@pytest.mark.skipif(toolchain_missing() is not None, reason=str(toolchain_missing()))
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("kind", ["plain", "gated", "grouped", "gathered"])
def test_stores_are_seen_before_the_count_and_loads_are_made_after_it(kind: str, arch: int) -> None:
    """By the memory model of PTX: a barrier orders the stores of all threads before the atomic of
    one, which releases them at the scope of the GPU; and an atomic that acquires, and a barrier,
    come before the loads. These bypass L1, though the acquire has emptied it."""
    gpu = GPUS[arch]
    if kind in ("plain", "gated"):
        gated, config = kind == "gated", replace(SHARES, BLOCK_N=64 if kind == "gated" else 128)
        code = gemm(spec(4, 128, gpu=gpu, gated=gated), config).read()
    else:
        code = routed(replace(DOWN, gpu=gpu, routing=kind), SHARES).read()
    memory = re.findall(r"\b(?:bar|atom|[sl][td]\.(?:global|shared))\.\S+", code.ptx)
    found = ORDERED.search(" ".join(memory) + " ")
    assert found is not None
    assert found["loads"].count("ld.global.cg.") >= SHARES.SPLIT_K * found["shares"].count("st.")
    assert "ld.global.nc" not in code.ptx
    names = [one.opcode for one in sass.parse(code.sass)[0] if one.name in IN_ORDER]
    counted = names.index("ATOMG.E.ADD.STRONG.GPU")
    before, after = names[:counted], names[counted + 1 :]
    assert re.fullmatch(r"MEMBAR\.\w+\.GPU", before[-1])
    assert before[-2].startswith("BAR.SYNC") and before[-3].startswith("STG.")
    assert after[0] == "CCTL.IVALL" and after[1].startswith("BAR.SYNC")
    strong = sum(".STRONG.GPU" in name for name in after)  # but for rows that gathered tiles lack
    assert SHARES.SPLIT_K <= strong <= found["loads"].count("ld.global.cg.")
    assert code.spills == code.stack_bytes == code.local_bytes == 0


# Whose counters a launch gets. The device is made up.


class Device:
    """What `counters` asks of one: the current stream, and whether it is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 7, False
        active = SimpleNamespace(get_current_stream=lambda index: self.stream)
        monkeypatch.setattr(arrivals, "driver", SimpleNamespace(active=active))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(arrivals, "_of_device", {})
        monkeypatch.setattr(
            arrivals, "_zeros", lambda number, device: torch.zeros(number, dtype=torch.int32)
        )

    def counters(self, number: int) -> Tensor:
        def of_the_graph(number: int, dtype: torch.dtype) -> Tensor:
            assert self.capturing
            return torch.zeros(number, dtype=dtype)

        x = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True, new_zeros=of_the_graph)
        return arrivals.counters(x, number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield Device(monkeypatch)


def overlap(a: Tensor, b: Tensor) -> bool:
    first, second = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in (a, b))
    return first[1] > second[0]


def test_a_stream_keeps_its_counters_and_shares_them_with_no_other(device: Device) -> None:
    first = device.counters(40)
    assert device.counters(1000).data_ptr() == first.data_ptr()
    device.stream = 8
    other = device.counters(40)
    assert not overlap(first, other)
    device.stream = 7
    more = device.counters(5000)
    assert more.numel() >= 5000 and not overlap(more, other)
    assert device.counters(40).data_ptr() == more.data_ptr()
    assert all(t.dtype == torch.int32 and not t.any() for t in (first, other, more))


def test_each_captured_launch_has_counters_of_its_own_that_stay(device: Device) -> None:
    of_stream = device.counters(40)
    device.capturing = True
    captured = [device.counters(40) for _ in range(20)]
    each = [of_stream, *captured]
    assert not any(overlap(a, b) for i, a in enumerate(each) for b in each[:i])
    places = [t.data_ptr() for t in captured]
    assert all(place % 128 == captured[0].data_ptr() % 128 for place in places)
    device.capturing = False
    made = arrivals._of_device[torch.device("cuda", 0)].made
    while len(made) < 3:  # more streams and captures, until the first are used up
        device.stream += 1
        device.counters(1 << 13)
    kept = {m.data_ptr() for m in made}
    assert {t.untyped_storage().data_ptr() for t in captured} <= kept


def test_a_capture_that_finds_none_left_fills_its_own(device: Device) -> None:
    device.capturing = True
    assert device.counters(40).numel() == 40  # before any launch outside of a capture
    device.capturing = False
    device.counters(40)
    device.capturing = True
    big = device.counters(arrivals.CHUNK)
    assert big.numel() == arrivals.CHUNK
    device.capturing = False
    device.counters(40)
    device.capturing = True
    assert device.counters(arrivals.CHUNK // 2).numel() == arrivals.CHUNK // 2


@pytest.mark.parametrize("number", [1, 33, arrivals.CHUNK, arrivals.CHUNK + 5])
def test_there_are_as_many_counters_as_tiles(number: int, device: Device) -> None:
    assert number <= device.counters(number).numel() <= number + max(number, 1 << 10)


# On a GPU.


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("case", [EVERYTHING, GATED], ids=["plain", "gated"])
def test_streams_and_graphs_that_run_at_once_keep_their_bits(case: Case) -> None:
    """Two graphs captured in one stream and replayed in two, beside launches in a third."""
    case = replace(case, m=16, n=2048, k=4096, config=replace(SHARES, BLOCK_N=64))
    inputs = draw(case)
    weight = packed(inputs.codes, inputs.scale, case.bits, case.group_size, 2, "cuda")
    x, bias, residual = (on_device(t, "cuda") for t in (inputs.x, inputs.bias, inputs.residual))
    epilogue = Epilogue(bias, residual, case.activation, case.gated)

    def one(config: TileConfig = case.config) -> Tensor:
        return launch.dequant_gemm(x, weight, epilogue, config, 2)

    want = one(replace(case.config, last_finishes=False))
    assert torch.equal(one(), want)
    graphs, streams = [], [torch.cuda.Stream() for _ in range(3)]
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = [one() for _ in range(4)]
        graphs.append((graph, made))
    torch.cuda.synchronize()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        for stream, (graph, _) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            wrong += (one() != want).sum()
    torch.cuda.synchronize()
    assert not wrong
    assert all(torch.equal(y, want) for _, made in graphs for y in made)
    assert_nobody_is_counted()
