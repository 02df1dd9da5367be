"""The drawn weights are what their names say."""

import pytest
import torch
from hypothesis import given

from tests.quant.strategies import KINDS, matrices, matrix


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_is_finite_and_repeatable(kind):
    w = matrix(kind, 5, 40, seed=3)
    assert w.shape == (5, 40) and w.isfinite().all()
    assert torch.equal(w, matrix(kind, 5, 40, seed=3))


def test_kinds_have_their_feature():
    assert (matrix("zero rows", 4, 8)[::2] == 0).all()
    assert matrix("outlier", 4, 90).abs().max() == 1000
    assert (matrix("equal", 4, 8).std(1) == 0).all()
    # Below float16's smallest normal number after division by 8: forces float32 scales.
    assert matrix("tiny", 4, 90).abs().max() / 8 < torch.finfo(torch.float16).tiny


@given(matrices())
def test_drawn_matrices_are_finite_in_every_dtype(w):
    assert w.dim() == 2 and w.isfinite().all()
