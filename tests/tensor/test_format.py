"""Number formats against two's complement."""

import pytest
import torch

from fqcompile.tensor.format import INT4, INT8, NORMAL4, QTYPES, qtype_for


@pytest.mark.parametrize(
    ("qtype", "low", "high", "per_byte"),
    [(INT4, -8, 7, 2), (NORMAL4, -8, 7, 2), (INT8, -128, 127, 1)],
)
def test_range_is_twos_complement(qtype, low, high, per_byte):
    assert (qtype.qmin, qtype.qmax, qtype.codes_per_byte) == (low, high, per_byte)


def test_formats_are_found_by_bits_and_levels():
    assert QTYPES == {(4, "uniform"): INT4, (4, "normal"): NORMAL4, (8, "uniform"): INT8}
    assert [q.name for q in QTYPES.values()] == ["int4", "normal4", "int8"]
    assert [q.storage_dtype for q in QTYPES.values()] == [torch.uint8, torch.uint8, torch.int8]
    for levels in ("uniform", "normal"):
        assert qtype_for(8, levels) is INT8 and qtype_for(4, levels).levels == levels


def test_integers_are_their_own_levels():
    assert INT4.values == tuple(range(-8, 8)) and INT8.values == tuple(range(-128, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normal_levels_ascend_around_zero_and_are_exact(dtype):
    levels = torch.tensor(NORMAL4.values, dtype=torch.float64)
    assert levels.shape == (16,) and bool((levels.diff() > 0).all()) and levels[8] == 0
    assert torch.equal(levels.to(dtype).double(), levels)
    assert torch.equal((16 * levels).to(torch.int8).double(), 16 * levels)
    assert levels[0] == -127 / 16 == -levels.abs().max()  # scales are as large as those of int4
