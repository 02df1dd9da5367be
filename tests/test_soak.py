"""The parts of `make soak`, for a moment each."""

import pytest
import torch

from tests import soak


def test_calls() -> None:
    with torch.no_grad():
        soak.soak_calls(200)


@pytest.mark.slow
def test_models() -> None:
    with torch.no_grad():
        soak.soak_models(9)


def test_threads() -> None:
    with torch.no_grad():
        done = soak.soak_threads(3, forks=False)
    assert done["writes"] > 1 and done["calls checked"] > 1
