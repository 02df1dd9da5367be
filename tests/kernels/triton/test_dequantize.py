"""The dequantise kernel is exact: code times scale in fp32, rounded once."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.triton.dequant_gemm import dequantize
from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.test_dequant_gemm import (
    FLOATS,
    FP16,
    FP32,
    Case,
    on_every_device,
    pack,
    random_weight,
)


@on_every_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_decodes_every_code_exactly(bits: int, dtype: torch.dtype, device: str) -> None:
    half = 2 ** (bits - 1)
    codes = torch.cartesian_prod(*[torch.arange(-half, half)] * (8 // bits)).reshape(4, -1)
    for scale_dtype in FLOATS:
        scale = torch.tensor([[1.0, -2.0], [3e-3, 0.7], [-0.3, 5e-8], [0.0, 9.0]]).to(scale_dtype)
        group_size = codes.shape[1] // 2 + 3
        want = codes.float() * scale.float()[:, torch.arange(codes.shape[1]) // group_size]
        got = run_dequantize(pack(codes, bits), scale, bits, group_size, codes.shape, dtype, device)
        assert torch.equal(got, want.to(dtype))


@on_every_device
@pytest.mark.parametrize("group_size", [1, 7, 48, 128, 293, 999])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_finds_every_group(bits: int, group_size: int, device: str) -> None:
    case = Case(n=41, k=293, bits=bits, group_size=group_size)
    qweight, scale, w = random_weight(case)
    got = run_dequantize(qweight, scale, bits, group_size, (case.n, case.k), FP32, device)
    assert torch.equal(got, w.float())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_dequantize_of_nothing_is_empty(shape: tuple[int, int]) -> None:
    scale = torch.ones(shape[0], 1)
    qweight = torch.zeros(shape, dtype=torch.int8)
    assert run_dequantize(qweight, scale, 8, 8, shape, FP16, "cpu").shape == shape


def run_dequantize(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
) -> torch.Tensor:
    n, k = shape
    with interpreted() if device == "cpu" else nullcontext():
        return dequantize(
            qweight.to(device),
            scale.to(device),
            bits=bits,
            group_size=group_size,
            n=n,
            k=k,
            dtype=dtype,
        ).cpu()
