"""Configurations by number of rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.errors import OptionError
from fqcompile.kernels.launch_table import DENSE, Config, LaunchTable, parse_config
from fqcompile.kernels.tile_config import TileConfig

SMALL, LARGE = TileConfig(16, 128, 128, 8, 4, 4), TileConfig(64, 128, 128, 1, 4, 3)
powers = st.sampled_from([16, 32, 64, 128])
configs = st.just(DENSE) | st.builds(TileConfig, powers, powers, powers, powers)


@given(bounds=st.sets(st.integers(1, 10**6), max_size=4), data=st.data())
def test_what_str_writes_parse_reads(bounds: set[int], data: st.DataObject) -> None:
    steps = [(bound, data.draw(configs)) for bound in sorted(bounds)]
    table = LaunchTable((*steps, (None, data.draw(configs))))
    assert LaunchTable.parse(str(table)) == table
    for bound, config in steps:
        assert table.at(bound) == config


def test_bounds_are_the_largest_rows_of_their_step() -> None:
    table = LaunchTable(((16, SMALL), (128, LARGE), (None, DENSE)))
    assert str(table) == "m16=16x128x128x8w4s4,m128=64x128x128x1w4s3,dense"
    expected = {1: SMALL, 16: SMALL, 17: LARGE, 128: LARGE, 129: DENSE, 10**9: DENSE}
    assert {m: table.at(m) for m in expected} == expected


@pytest.mark.parametrize(
    "steps",
    [(), ((16, SMALL),), ((None, SMALL), (None, LARGE)), ((32, SMALL), (16, LARGE), (None, DENSE))],
)
def test_bounds_that_leave_a_gap_are_refused(steps: tuple[tuple[int | None, Config], ...]) -> None:
    with pytest.raises(OptionError, match="launch table"):
        LaunchTable(steps)


@pytest.mark.parametrize("text", ["", "m16=dense", "dense,", "m16=,dense", "m16", "fast"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        LaunchTable.parse(text)


def test_a_configuration_alone_may_be_dense() -> None:
    assert parse_config("dense") is DENSE
    assert parse_config(str(SMALL)) == SMALL
