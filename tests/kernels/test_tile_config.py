"""TileConfig: text and back, and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.errors import OptionError
from fqcompile.kernels.tile_config import TileConfig

powers = st.sampled_from([2**e for e in range(11)])


@given(
    config=st.builds(
        TileConfig,
        BLOCK_M=powers,
        BLOCK_N=powers,
        BLOCK_K=powers,
        SPLIT_K=powers,
        num_warps=powers,
        num_stages=st.integers(1, 9),
    )
)
def test_parse_reads_what_str_wrote(config: TileConfig) -> None:
    assert TileConfig.parse(str(config)) == config


def test_text_is_compact() -> None:
    assert str(TileConfig(16, 64, 128, 2, num_warps=8, num_stages=4)) == "16x64x128x2w8s4"


@pytest.mark.parametrize(
    "text", ["", "16x64", "16x64x128x1w4", "ax64x128x1w4s3", "16x64x128x1w4s3 "]
)
def test_parse_says_what_the_form_is(text: str) -> None:
    with pytest.raises(OptionError, match=r"is not of the form .*for example '16x64x128x1w4s3'"):
        TileConfig.parse(text)


@pytest.mark.parametrize("name", ["BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "num_warps"])
@pytest.mark.parametrize("value", [0, -2, 3, 48])
def test_sizes_are_powers_of_two(name: str, value: int) -> None:
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16} | {name: value}
    with pytest.raises(OptionError, match=f"TileConfig.{name}={value} must be a power of two"):
        TileConfig(**sizes)


def test_stages_start_at_one() -> None:
    with pytest.raises(OptionError, match="num_stages=0 must be at least 1"):
        TileConfig(16, 16, 16, num_stages=0)
