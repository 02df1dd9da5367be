"""The GEMM against fp64 dequantize-then-multiply: in the interpreter, and on a GPU if there is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.spec import TileConfig
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
    check,
    every_format,
    on_every_device,
)
from tests.tiers import examples


@on_every_device
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@every_format
def test_gemm_is_right_for_every_type(
    bits: int, levels: str, dtype: torch.dtype, scale_dtype: torch.dtype, device: str
) -> None:
    check(Case(k=131, bits=bits, levels=levels, dtype=dtype, scale_dtype=scale_dtype), device)


@on_every_device
@pytest.mark.parametrize("kwidth", [2, 4])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@every_format
def test_gemm_is_right_for_every_operand(
    bits: int, levels: str, dtype: torch.dtype, conversion: str, kwidth: int, device: str
) -> None:
    case = Case(k=128, bits=bits, levels=levels, dtype=dtype, conversion=conversion, kwidth=kwidth)
    check(case, device)


@on_every_device
@pytest.mark.parametrize("k", [300, 512])
@pytest.mark.parametrize("group_size", GROUPS)
@every_format
def test_gemm_is_right_for_every_group_size(
    bits: int, levels: str, group_size: int, k: int, device: str
) -> None:
    check(Case(k=k, bits=bits, levels=levels, group_size=group_size), device)


@on_every_device
@pytest.mark.parametrize("group_size", UNEVEN_GROUPS)
@every_format
def test_gemm_is_right_for_groups_that_end_inside_a_later_block(
    bits: int, levels: str, group_size: int, device: str
) -> None:
    check(Case(k=700, bits=bits, levels=levels, group_size=group_size), device)


@on_every_device
@pytest.mark.parametrize("k", [1, 2, 17, 127, 129, 192, 256])
@pytest.mark.parametrize("m", [1, 16, 17])
def test_gemm_is_right_for_every_k(m: int, k: int, device: str) -> None:
    check(Case(m=m, n=5, k=k, dtype=BF16), device)
    check(Case(m=m, n=5, k=k, bits=8, group_size=COLUMN), device)


@on_every_device
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gemm_applies_every_epilogue(
    activation: str, bias: bool, residual: bool, device: str
) -> None:
    """By itself, over gate and up of whole micro-tiles, and after a split or a ragged gate."""
    case = Case(n=16, k=40, activation=activation, bias=bias, residual=residual)
    check(case, device)
    check(replace(case, gated=True, dtype=BF16), device)
    check(replace(case, gated=True, n=19), device)
    check(replace(case, config=replace(SMALL, SPLIT_K=2)), device)


@on_every_device
@pytest.mark.parametrize("n", [16, 48, 50, 112, 130, 144, 250])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, COLUMN)])
def test_gated_gemm_finds_the_rows_of_up(
    bits: int, group_size: int, split_k: int, n: int, device: str
) -> None:
    case = Case(n=n, k=200, bits=bits, group_size=group_size, gated=True, activation="silu")
    check(replace(case, config=TileConfig(16, 128, 128, split_k, 4, 2)), device)


@on_every_device
@pytest.mark.parametrize("split_k", [2, 4, 64])
@pytest.mark.parametrize("k", [100, 130, 600, 700])
@pytest.mark.parametrize("group_size", [32, 256, COLUMN])
def test_shares_of_k_add_up(group_size: int, k: int, split_k: int, device: str) -> None:
    """Of 1, 2, 5 and 6 blocks: also with shares that are short or have none at all."""
    config = replace(SMALL, SPLIT_K=split_k)
    case = Case(k=k, group_size=group_size, bias=True, residual=True, config=config)
    check(case, device)
    check(replace(case, levels="normal"), device)


@on_every_device
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("block_n", [64, 128, 256])
def test_gemm_is_right_for_every_tile(block_n: int, block_m: int, device: str) -> None:
    config = TileConfig(block_m, block_n, 128, 1, 4, 2)
    check(Case(m=33, n=300, k=130, bias=True, residual=True, config=config), device)


@on_every_device
@pytest.mark.parametrize("scales", ["some zero", "denormal"])
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_gemm_is_right_for_zero_and_denormal_scales(
    dtype: torch.dtype, scale_dtype: torch.dtype, scales: str, device: str
) -> None:
    for group_size in (32, COLUMN):
        case = Case(group_size=group_size, dtype=dtype, scale_dtype=scale_dtype, scales=scales)
        check(case, device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k = draw(st.integers(1, 300) | st.sampled_from([384, 512, 699, 700]), label="k")
    gated = draw(st.booleans(), label="gated")
    widths = [64, 128] if gated else [64, 128, 256]
    bits, levels = draw(st.sampled_from(FORMATS), label="format")
    return Case(
        m=draw(st.integers(0, 33), label="m"),
        n=draw(st.integers(1, 40) | st.sampled_from([64, 127, 160, 255, 300]), label="n"),
        k=k,
        bits=bits,
        levels=levels,
        group_size=draw(st.sampled_from([*GROUPS, 80, 112]), label="group_size"),
        dtype=draw(st.sampled_from(NARROW), label="dtype"),
        scale_dtype=draw(st.sampled_from(FLOATS), label="scale_dtype"),
        scales=draw(st.sampled_from(["normal", "some zero", "denormal"]), label="scales"),
        bias=draw(st.booleans(), label="bias"),
        residual=draw(st.booleans(), label="residual"),
        activation=draw(st.sampled_from(ACTIVATIONS), label="activation"),
        gated=gated,
        kwidth=draw(st.sampled_from([2, 4]), label="kwidth"),
        conversion=draw(st.sampled_from(CONVERSIONS), label="conversion"),
        config=TileConfig(
            BLOCK_M=draw(st.sampled_from([16, 32, 64]), label="BLOCK_M"),
            BLOCK_N=draw(st.sampled_from(widths), label="BLOCK_N"),
            BLOCK_K=128,
            SPLIT_K=draw(st.sampled_from([1, 1, 2, 4, 8]), label="SPLIT_K"),
        ),
        seed=draw(st.integers(0, 9), label="seed"),
    )


@on_every_device
@settings(max_examples=examples(45), deadline=None)
@given(case=cases())
def test_gemm_is_right_for_any_case(case: Case, device: str) -> None:
    check(case, device)
