"""The dequantize kernel is exact: code times scale in fp32, rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.triton import launch
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.oracle import (
    CONVERSIONS,
    FLOATS,
    FORMATS,
    FP16,
    FP32,
    GROUPS,
    UNEVEN_GROUPS,
    every_format,
    group_of,
    levels_of,
    on_every_device,
    packed,
    random_codes,
    running,
)
from tests.tiers import examples


def run(
    weight: QuantizedTensor, dtype: torch.dtype, kwidth: int = 2, conversion: str = "subnormal"
) -> torch.Tensor:
    device = weight.qweight.device.type
    with pytest.MonkeyPatch.context() as patch, running(device) as memory:
        patch.setattr(launch, "conversion", lambda device, dtype: conversion)
        w = launch.dequantize(weight, dtype, kwidth)
        assert memory is None or memory.unwritten(w) == 0
    assert (w.dtype, w.shape) == (dtype, (weight.rows, weight.k))
    return w.cpu()


def exact(
    levels: torch.Tensor, scale: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    return (levels.float() * scale.float()[:, group_of(levels.shape[1], group_size)]).to(dtype)


@on_every_device
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("conversion", CONVERSIONS)
@every_format
def test_dequantize_decodes_every_code_exactly(
    bits: int, levels: str, conversion: str, scale_dtype: torch.dtype, device: str
) -> None:
    """Every code meets every scale: ordinary, negative, zero, subnormal, huge and infinite ones."""
    half = 2 ** (bits - 1)
    codes = (torch.arange(5)[:, None] + torch.arange(500)) % (2 * half) - half
    scale = torch.tensor([[0.7, -3e-3], [0.0, 5e-8], [6e4, -1e-40], [torch.inf, 1.0], [-0.3, -2.0]])
    codes, scale = codes.to(torch.int8), scale.to(scale_dtype)
    weight = packed(codes, scale, bits, 256, device=device, levels=levels)
    for dtype in FLOATS:
        want = exact(levels_of(codes, bits, levels), scale, 256, dtype)
        got = run(weight, dtype, conversion=conversion)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@on_every_device
@pytest.mark.parametrize("k", [300, 512])
@pytest.mark.parametrize("group_size", GROUPS)
@every_format
def test_dequantize_finds_every_group(
    bits: int, levels: str, group_size: int, k: int, device: str
) -> None:
    codes, scale = random_codes(bits, 41, k), torch.randn(41, -(-k // group_size)).half()
    got = run(packed(codes, scale, bits, group_size, device=device, levels=levels), FP32)
    assert torch.equal(got, exact(levels_of(codes, bits, levels), scale, group_size, FP32))


@on_every_device
@pytest.mark.parametrize("group_size", UNEVEN_GROUPS)
def test_dequantize_finds_groups_that_end_inside_a_later_block(
    group_size: int, device: str
) -> None:
    test_dequantize_finds_every_group(4, "normal", group_size, 700, device)


@on_every_device
@settings(max_examples=examples(25), deadline=None)
@given(
    rows=st.integers(1, 70),
    k=st.integers(1, 400),
    form=st.sampled_from(FORMATS),
    kwidth=st.sampled_from([2, 4]),
    group_size=st.sampled_from([*GROUPS, 80, 112]),
    scale_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 9),
)
def test_dequantize_is_exact_for_any_shape(
    rows: int,
    k: int,
    form: tuple[int, str],
    kwidth: int,
    group_size: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    seed: int,
    device: str,
) -> None:
    torch.manual_seed(seed)
    bits, levels = form
    codes, scale = random_codes(bits, rows, k), torch.randn(rows, -(-k // group_size))
    scale = scale.to(scale_dtype)
    got = run(packed(codes, scale, bits, group_size, kwidth, device, levels), dtype, kwidth)
    assert torch.equal(got, exact(levels_of(codes, bits, levels), scale, group_size, dtype))


@on_every_device
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_dequantize_of_nothing_is_empty(shape: tuple[int, int], device: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    assert run(QuantizedTensor(nothing, nothing, Format(8, 8, *shape)), FP16).shape == shape
