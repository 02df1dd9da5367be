"""What cannot be quantized and whether the reason says enough; relative_error against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given

from fqcompile.errors import UnquantizableWeight
from fqcompile.quant.checks import check_quantizable, relative_error
from tests.quant.strategies import matrices


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_non_finite_values_are_counted_and_the_first_located(value, dtype):
    w = torch.ones(300, 1000, dtype=dtype)
    w[140, 7] = w[140, 900] = w[299, 0] = value
    with pytest.raises(UnquantizableWeight, match=rf"^3 of 300000 .*{value} at \(140, 7\)$"):
        check_quantizable(w)


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        (torch.ones(2, 3, dtype=torch.int32), "torch.int32"),
        (torch.ones(2, 3, dtype=torch.bool), "torch.bool"),
        (torch.ones(2, 3, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "torch.qint8"),
        (torch.ones(2, 3).to_sparse(), "sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (torch.ones(2, 3, device="meta"), "meta"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(2, 3, 4), r"\(2, 3, 4\)"),
        (torch.ones(0, 3), r"\(0, 3\)"),
        (torch.ones(3, 0), r"\(3, 0\)"),
        (torch.full((2, 3), 1e300, dtype=torch.float64), "6 of 6 .*beyond the range of float32"),
        (torch.full((2, 3), 1e-300, dtype=torch.float64), "1e-300"),
    ],
)
def test_reason_names_what_was_found(w, reason):
    with pytest.raises(UnquantizableWeight, match=reason):
        check_quantizable(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_finite_matrices_pass(dtype):
    check_quantizable(torch.zeros(2, 3, dtype=dtype))
    check_quantizable(torch.full((2, 3), torch.finfo(torch.float16).max, dtype=dtype))
    check_quantizable(torch.full((3, 2), torch.finfo(torch.float16).tiny, dtype=dtype).t())


@given(matrices())
def test_equals_numpy(w):
    w_hat = (w.double() * 1.01 + 1e-3).to(w.dtype)
    exact, changed = (t.double().numpy() for t in (w, w_hat))
    norm = np.linalg.norm(exact)
    if norm == 0:
        return
    # Both sum at most 1350 squares in float64: 1350 * 2^-53 relative, far below 1e-9.
    assert relative_error(w, w_hat) == pytest.approx(np.linalg.norm(exact - changed) / norm, 1e-9)


def test_edges():
    zero = torch.zeros(2, 3)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, zero + 1) == float("inf")
    assert relative_error(zero + 1, zero) == 1


def test_spans_several_chunks_and_does_not_overflow():
    w = torch.full((70, 4096), torch.finfo(torch.float32).max)
    assert relative_error(w, w / 2) == pytest.approx(0.5, abs=1e-12)
