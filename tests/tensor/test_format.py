"""Number formats against two's complement."""

import pytest
import torch

from fqcompile.tensor.format import INT4, INT8, QTYPES


@pytest.mark.parametrize(
    ("qtype", "low", "high", "per_byte"), [(INT4, -8, 7, 2), (INT8, -128, 127, 1)]
)
def test_range_is_twos_complement(qtype, low, high, per_byte):
    assert (qtype.qmin, qtype.qmax, qtype.codes_per_byte) == (low, high, per_byte)


def test_formats_are_found_by_bits():
    assert QTYPES == {4: INT4, 8: INT8}
    assert (INT4.storage_dtype, INT8.storage_dtype) == (torch.uint8, torch.int8)
