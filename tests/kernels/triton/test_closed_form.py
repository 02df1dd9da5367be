"""The configuration chosen without measuring."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.triton.dequant_gemm import closed_form_config


@pytest.mark.parametrize(
    ("group_size", "block_k"),
    [
        (7, 16),
        (16, 16),
        (24, 32),
        (32, 32),
        (48, 64),
        (96, 32),
        (128, 128),
        (512, 128),
        (4096, 128),
    ],
)
def test_closed_form_fits_the_k_tile_to_the_group(group_size: int, block_k: int) -> None:
    chosen = closed_form_config(1, 4096, 4096, 4, group_size).BLOCK_K
    assert chosen == block_k


@given(
    m=st.integers(0, 10**6),
    n=st.integers(1, 10**5),
    k=st.integers(1, 10**5),
    group_size=st.integers(1, 10**5),
    gated=st.booleans(),
)
def test_closed_form_fills_its_tiles(m: int, n: int, k: int, group_size: int, gated: bool) -> None:
    config = closed_form_config(m, n, k, 4, group_size, gated)
    assert 16 <= config.BLOCK_M <= 128
    assert min(m, 64) <= config.BLOCK_M
    assert min(config.BLOCK_N, config.BLOCK_K) >= 16
    assert config.SPLIT_K == 1
    if group_size < k and group_size % 32 == 0:
        assert group_size % config.BLOCK_K == 0
