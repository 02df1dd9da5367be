"""What kernels are told: GPUs known and derived, tile configurations and tables of them as text."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.errors import NoKernelError, OptionError
from fqcompile.kernels import spec
from fqcompile.kernels.spec import (
    A100,
    DENSE,
    H200,
    Config,
    Gpu,
    LaunchTable,
    TileConfig,
    gpu_of,
    parse_config,
)

# As an H200's driver describes it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    clock_rate=1_980_000,
    memory_clock_rate=3_201_000,
    memory_bus_width=6144,
    shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="",
)


def visible(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Gpu:
    properties = SimpleNamespace(**{**vars(PROPERTIES), **changes})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    spec._gpu_at.cache_clear()
    try:
        return gpu_of(torch.device("cuda"))
    finally:
        spec._gpu_at.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_that_is_what_the_error_says() -> None:
    with pytest.raises(NoKernelError, match="device cuda: torch sees no GPU on this machine"):
        gpu_of(torch.device("cuda"))


def test_a_known_gpu_is_taken_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible(monkeypatch) is H200


def test_an_unknown_one_is_derived_from_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = visible(monkeypatch, name="NVIDIA H2000")
    assert (found.arch, found.capability, found.num_sms) == ("sm_90", 90, 132)
    assert found.shared_bytes == H200.shared_bytes
    assert found.bandwidth == pytest.approx(H200.bandwidth, rel=0.05)
    assert found.matrix_flops == pytest.approx(H200.matrix_flops, rel=0.15)


@pytest.mark.parametrize(
    ("name", "major", "minor", "sms", "mhz", "teraflops"),
    [
        ("NVIDIA GeForce RTX 3090", 8, 6, 82, 1695, 71),
        ("NVIDIA A10", 8, 6, 72, 1695, 125),
        ("NVIDIA GeForce RTX 4090", 8, 9, 128, 2520, 165),
        ("NVIDIA L40S", 8, 9, 142, 2520, 362),
        ("NVIDIA B200", 10, 0, 148, 1850, 2250),
        ("NVIDIA GeForce RTX 5090", 12, 0, 170, 2407, 210),
        ("NVIDIA RTX PRO 6000 Blackwell", 12, 0, 188, 2617, 504),
        ("NVIDIA GB10", 12, 1, 48, 2418, 125),
    ],
)
def test_matrix_rates_are_those_of_datasheets(
    name: str, major: int, minor: int, sms: int, mhz: int, teraflops: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Dense bf16 with fp32 sums; 80 % of them."""
    found = visible(
        monkeypatch, name=name, major=major, minor=minor, multi_processor_count=sms,
        clock_rate=1000 * mhz,
    )  # fmt: skip
    assert found.matrix_flops == pytest.approx(0.8 * teraflops * 1e12, rel=0.06)
    assert found.has_wgmma is (major in (9, 10))


def test_what_no_datasheet_tells_is_not_taken_for_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    found = visible(monkeypatch, name="NVIDIA R200", major=14, minor=0)
    assert found.matrix_flops == pytest.approx(0.8 * 1024 * 132 * 1.98e9)


def test_clocks_that_are_not_told_are_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    found = visible(monkeypatch, name="NVIDIA vGPU", clock_rate=0, memory_clock_rate=0)
    assert min(found.clock_hz, found.bandwidth, found.matrix_flops) > 0


def test_amd_has_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = visible(monkeypatch, name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+")
    assert (found.arch, found.capability) == ("gfx942", 0)
    assert A100.capability == 80


sizes = st.sampled_from([2**e for e in range(11)])


@given(
    config=st.builds(
        TileConfig,
        BLOCK_M=sizes,
        BLOCK_N=sizes,
        BLOCK_K=sizes,
        SPLIT_K=sizes,
        num_warps=sizes,
        num_stages=st.integers(1, 9),
    )
)
def test_parse_reads_what_str_wrote(config: TileConfig) -> None:
    assert TileConfig.parse(str(config)) == config
    if config.SPLIT_K > 1:
        last = replace(config, last_finishes=True)
        assert TileConfig.parse(str(last)) == last
        assert str(last) != str(config)


def test_text_is_compact() -> None:
    config = TileConfig(16, 64, 128, 2, num_warps=8, num_stages=4)
    assert str(config) == "16x64x128x2w8s4"
    assert str(replace(config, last_finishes=True)) == "16x64x128x2w8s4-last"


@pytest.mark.parametrize(
    "text", ["", "16x64", "16x64x128x1w4", "ax64x128x1w4s3", "16x64x128x1w4s3 "]
)
def test_parse_says_what_the_form_is(text: str) -> None:
    with pytest.raises(OptionError, match=r"is not of the form .*for example '16x64x128x1w4s3'"):
        TileConfig.parse(text)


@pytest.mark.parametrize("name", ["BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "num_warps"])
@pytest.mark.parametrize("value", [0, -2, 3, 48])
def test_sizes_are_sizes_of_two(name: str, value: int) -> None:
    given_sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16} | {name: value}
    with pytest.raises(OptionError, match=f"TileConfig.{name}={value} must be a power of two"):
        TileConfig(**given_sizes)


def test_one_share_has_no_last_program() -> None:
    with pytest.raises(OptionError, match="last_finishes=True needs SPLIT_K of at least 2, not 1"):
        TileConfig(16, 16, 16, last_finishes=True)
    with pytest.raises(OptionError, match="last_finishes=True"):
        TileConfig.parse("16x64x128x1w4s4-last")


def test_stages_start_at_one() -> None:
    with pytest.raises(OptionError, match="num_stages=0 must be at least 1"):
        TileConfig(16, 16, 16, num_stages=0)


SMALL, LARGE = TileConfig(16, 128, 128, 8, 4, 4), TileConfig(64, 128, 128, 1, 4, 3)
powers = st.sampled_from([16, 32, 64, 128])
configs = st.just(DENSE) | st.builds(TileConfig, powers, powers, powers, powers)


@given(bounds=st.sets(st.integers(1, 10**6), max_size=4), data=st.data())
def test_a_table_reads_what_it_wrote(bounds: set[int], data: st.DataObject) -> None:
    steps = [(bound, data.draw(configs)) for bound in sorted(bounds)]
    table = LaunchTable((*steps, (None, data.draw(configs))))
    assert LaunchTable.parse(str(table)) == table
    for bound, config in steps:
        assert table.at(bound) == config


def test_bounds_are_the_largest_rows_of_their_step() -> None:
    table = LaunchTable(((16, SMALL), (128, LARGE), (None, DENSE)))
    assert str(table) == "m16=16x128x128x8w4s4,m128=64x128x128x1w4s3,dense"
    expected = {1: SMALL, 16: SMALL, 17: LARGE, 128: LARGE, 129: DENSE, 10**9: DENSE}
    assert {m: table.at(m) for m in expected} == expected


@pytest.mark.parametrize(
    "steps",
    [(), ((16, SMALL),), ((None, SMALL), (None, LARGE)), ((32, SMALL), (16, LARGE), (None, DENSE))],
)
def test_bounds_that_leave_a_gap_are_refused(steps: tuple[tuple[int | None, Config], ...]) -> None:
    with pytest.raises(OptionError, match="launch table"):
        LaunchTable(steps)


@pytest.mark.parametrize("text", ["", "m16=dense", "dense,", "m16=,dense", "m16", "fast"])
def test_text_of_no_table_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        LaunchTable.parse(text)


def test_a_configuration_alone_may_be_dense() -> None:
    assert parse_config("dense") is DENSE
    assert parse_config(str(SMALL)) == SMALL
