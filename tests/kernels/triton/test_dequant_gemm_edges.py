"""The GEMM on views, on NaN and infinities, and beyond the ranges of fp16 and int32."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.triton.dequant_gemm import closed_form_config, dequant_gemm
from tests.kernels.triton.test_dequant_gemm import (
    ACTIVATIONS,
    FP16,
    FP32,
    Case,
    inside_nans,
    no_gpu,
    on_every_device,
    random_weight,
    run,
)


@on_every_device
def test_gemm_reads_x_of_any_strides(device: str) -> None:
    case = Case(m=6, k=40)
    qweight, scale, _ = random_weight(case)
    x = torch.randn(case.m, case.k).to(case.dtype)
    want = run(case, x, qweight, scale, device=device)
    for view in (x.t().contiguous().t(), inside_nans(x), x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(run(case, view, qweight, scale, device=device), want)
    row = x[:1].expand(case.m, case.k)
    assert torch.equal(run(case, row, qweight, scale, device=device), want[:1].expand(case.m, -1))


@on_every_device
def test_a_row_with_nan_or_inf_stays_alone(device: str) -> None:
    case = Case(m=4, k=40)
    qweight, scale, _ = random_weight(case)
    x = torch.randn(case.m, case.k).to(case.dtype)
    clean = run(case, x, qweight, scale, device=device)
    x[1, 3], x[2, 39] = torch.nan, torch.inf
    y = run(case, x, qweight, scale, device=device)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert not y[1:3].isfinite().any()


@on_every_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_stay_finite_far_out(activation: str, device: str) -> None:
    case = Case(m=1, n=3, k=1, bits=8, dtype=FP32, scale_dtype=FP32, activation=activation)
    scale = torch.tensor([[1e20], [-1e20], [torch.nan]])
    qweight = torch.ones(3, 1, dtype=torch.int8)
    y = run(case, torch.ones(1, 1), qweight, scale, device=device)[0]
    assert y[0] == torch.tensor(1e20)
    assert y[1] == (torch.tensor(-1e20) if activation == "none" else 0)
    assert y[2].isnan()


@on_every_device
def test_sums_beyond_the_range_of_fp16_are_scaled_before_they_are_rounded(device: str) -> None:
    case = Case(m=1, n=1, k=64, bits=8, group_size=64, scale_dtype=FP32)
    qweight = torch.full((1, 64), -128, dtype=torch.int8)
    x, scale = torch.full((1, 64), 60000.0, dtype=FP16), torch.full((1, 1), -(2.0**-20))
    assert run(case, x, qweight, scale, device=device).item() == 468.75


@pytest.mark.gpu
@no_gpu
def test_rows_of_x_may_be_further_apart_than_int32() -> None:
    case = Case(m=3, k=40)
    qweight, scale, _ = random_weight(case)
    x = torch.randn(case.m, case.k).to(case.dtype)
    want = run(case, x, qweight, scale, device="cuda")
    stride = 2**30 + 16
    far = torch.empty(2 * stride + case.k, dtype=case.dtype, device="cuda")
    far = far.as_strided(x.shape, (stride, 1)).copy_(x)
    got = dequant_gemm(
        far, qweight.cuda(), scale.cuda(), None, None, bits=4, group_size=32, n=case.n, k=case.k,
        activation="none", gated=False, config=closed_form_config(3, case.n, case.k, 4, 32),
    )  # fmt: skip
    assert torch.equal(got.cpu(), want)
