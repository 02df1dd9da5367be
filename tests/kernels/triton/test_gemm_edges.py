"""The GEMM on views, on NaN and infinities, at the ends of the ranges, and twice."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.triton import launch
from tests.kernels.triton.oracle import (
    ACTIVATIONS,
    BF16,
    COLUMN,
    CONVERSIONS,
    FP16,
    FP32,
    NARROW,
    SMALL,
    Case,
    Inputs,
    assert_close,
    draw,
    expected,
    group_of,
    no_gpu,
    on_every_device,
    packed,
    run,
)

SPLIT = replace(SMALL, SPLIT_K=2)
every_end = pytest.mark.parametrize("config", [SMALL, SPLIT], ids=str)


@on_every_device
@every_end
def test_gemm_reads_x_of_any_strides(config: object, device: str) -> None:
    case = Case(m=6, k=140, group_size=128, config=config)
    inputs = draw(case)
    want, x = run(case, inputs, device), inputs.x.contiguous()
    for view in (x, x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(run(case, replace(inputs, x=view), device), want)
    row = replace(inputs, x=x[:1].expand(case.m, case.k))
    assert torch.equal(run(case, row, device), want[:1].expand(case.m, -1))


@on_every_device
@every_end
def test_gemm_reads_a_residual_of_any_strides(config: object, device: str) -> None:
    case = Case(m=6, k=140, group_size=128, residual=True, config=config)
    inputs = draw(case)
    want, residual = run(case, inputs, device), inputs.residual.contiguous()
    for view in (residual, residual.t().contiguous().t(), residual.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(run(case, replace(inputs, residual=view), device), want)
    row = replace(inputs, residual=residual[:1].expand(case.m, case.n))
    assert torch.equal(run(case, row, device)[0], want[0])


@on_every_device
@every_end
@pytest.mark.parametrize("gated", [False, True])
def test_gemm_computes_the_same_bits_again(gated: bool, config: object, device: str) -> None:
    case = Case(m=17, n=48, gated=gated, bias=True, residual=True, config=config)
    inputs = draw(case)
    assert torch.equal(run(case, inputs, device), run(case, inputs, device))


@on_every_device
@pytest.mark.parametrize("split_k", [1, 8])
def test_gemm_of_no_rows_is_empty(split_k: int, device: str) -> None:
    case = Case(m=0, bias=True, residual=True, config=replace(SMALL, SPLIT_K=split_k))
    assert run(case, draw(case), device).shape == (0, case.n)


@on_every_device
@every_end
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_with_nan_or_inf_stays_alone(bits: int, config: object, device: str) -> None:
    case = Case(m=5, k=140, bits=bits, group_size=64, config=config)
    inputs = draw(case)
    inputs.codes[inputs.codes == 0] = 1
    clean = run(case, inputs, device)
    inputs.x[1, 3], inputs.x[2, 139], inputs.x[3, 70] = torch.nan, torch.inf, -torch.inf
    y = run(case, inputs, device)
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    assert not y[1:4].isfinite().any()


@on_every_device
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_infinities_have_the_sign_of_their_weight(
    bits: int, dtype: torch.dtype, conversion: str, device: str
) -> None:
    """And none where the weight is zero: that is NaN, as in eager."""
    case = Case(m=4, k=140, bits=bits, dtype=dtype, group_size=64, conversion=conversion)
    inputs = draw(case)
    inputs.x[0, 3], inputs.x[1, 139], inputs.x[2, 70] = torch.inf, -torch.inf, torch.nan
    inputs.x[3, 5], inputs.x[3, 100] = torch.inf, -torch.inf
    y = run(case, inputs, device).cpu().float()
    want = inputs.x.float() @ inputs.w.float().t()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y[y.isinf()], want[want.isinf()])
    assert torch.equal(y.isinf(), want.isinf())


@on_every_device
def test_an_infinite_column_stays_alone(device: str) -> None:
    case = Case(m=3, n=37, k=140, bias=True)
    inputs = draw(case)
    clean = run(case, inputs, device)
    inputs.scale[[5, 36]], inputs.bias[8] = torch.inf, torch.nan
    y = run(case, inputs, device)
    others = [n for n in range(37) if n not in (5, 8, 36)]
    assert torch.equal(y[:, others], clean[:, others])
    assert not y[:, [5, 8, 36]].isfinite().any()


def constant(case: Case, x: float, code: int, scale: torch.Tensor) -> Inputs:
    """Everything the same but the scales [rows, groups]."""
    codes = torch.full((case.rows, case.k), code, dtype=torch.int8)
    w = codes.double() * scale.double()[:, group_of(case.k, case.group_size)]
    return Inputs(torch.full((case.m, case.k), x, dtype=case.dtype), codes, scale, w, None, None)


@on_every_device
@every_end
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_stay_finite_far_out(
    activation: str, config: object, device: str
) -> None:
    case = Case(
        m=1, n=3, k=1, bits=8, dtype=BF16, group_size=COLUMN, activation=activation, config=config
    )
    inputs = constant(case, 1.0, 1, torch.tensor([[1e20], [-1e20], [torch.nan]]))
    y = run(case, inputs, device)[0]
    assert y[0] == (7 if activation == "swiglu_oai" else torch.tensor(1e20).bfloat16())
    assert y[1] == (torch.tensor(-1e20).bfloat16() if activation == "none" else 0)
    assert y[2].isnan()


@on_every_device
@every_end
@pytest.mark.parametrize("group_size", [64, COLUMN])
def test_sums_beyond_fp16_are_scaled_before_they_are_rounded(
    group_size: int, config: object, device: str
) -> None:
    """Σ q x = 64 * 128 * 6e4 is 7500 times the largest fp16; the result is not."""
    case = Case(m=1, n=1, k=64, bits=8, group_size=group_size, config=config)
    inputs = constant(case, 6e4, -128, torch.full((1, 1), -(2.0**-20)))
    assert run(case, inputs, device).item() == 468.75


@on_every_device
@every_end
@pytest.mark.parametrize("group_size", [32, COLUMN])
def test_weights_beyond_fp16_give_finite_results(
    group_size: int, config: object, device: str
) -> None:
    """Scales up to 6e4, so |ŵ| up to 4.8e5; x is small enough for y to be of fp16."""
    case = Case(m=3, group_size=group_size, config=config)
    inputs = draw(case)
    inputs.scale[::3] = 6e4
    w = inputs.codes.double() * inputs.scale.double()[:, group_of(case.k, group_size)]
    inputs = replace(inputs, x=inputs.x * 2.0**-10, w=w)
    assert w.abs().max() > 7 * torch.finfo(FP16).max
    y = run(case, inputs, device)
    assert expected(case, inputs)[0].abs().max() < torch.finfo(FP16).max
    assert_close(case, inputs, y)


@on_every_device
def test_results_beyond_the_type_are_infinite(device: str) -> None:
    case = Case(m=1, n=2, k=16, bits=4, scale_dtype=FP32, group_size=COLUMN)
    y = run(case, constant(case, 1.0, 4, torch.tensor([[2e3], [-2e3]])), device)
    assert y.tolist() == [[torch.inf, -torch.inf]]


@on_every_device
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_subnormal_x_counts(dtype: torch.dtype, device: str) -> None:
    case = Case(m=1, n=1, k=16, dtype=dtype, scale_dtype=FP32, group_size=COLUMN)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    y = run(case, constant(case, least, -8, torch.full((1, 1), 0.5)), device)
    assert y.item() == -64 * least


@pytest.mark.gpu
@no_gpu
def test_rows_of_x_may_be_further_apart_than_int32() -> None:
    case = Case(m=3, k=40)
    inputs = draw(case)
    want = run(case, inputs, "cuda")
    stride = 2**30 + 16
    far = torch.empty(2 * stride + case.k, dtype=case.dtype, device="cuda")
    far = far.as_strided(inputs.x.shape, (stride, 1)).copy_(inputs.x)
    weight = packed(inputs.codes, inputs.scale, 4, case.group_size, device="cuda")
    got = launch.dequant_gemm(far, weight, Epilogue(), SMALL, 2)
    assert torch.equal(got.cpu(), want)
