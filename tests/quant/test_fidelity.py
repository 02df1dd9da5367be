"""relative_error against NumPy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given

from fqcompile.quant.fidelity import relative_error
from tests.quant.strategies import matrices


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
