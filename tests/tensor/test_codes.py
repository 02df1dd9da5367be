"""Packing is exact both ways; the oracle is Python's integers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.tensor.codes import pack, unpack
from fqcompile.tensor.format import INT4, INT8, packed_columns
from tests.quant.strategies import qtypes


def test_every_pair_of_int4_codes_has_its_byte():
    pairs = list(itertools.product(range(-8, 8), repeat=2))
    packed = pack(torch.tensor(pairs, dtype=torch.int8), INT4)
    assert packed.dtype == torch.uint8
    assert packed[:, 0].tolist() == [(low + 8) | (high + 8) << 4 for low, high in pairs]


def test_every_byte_unpacks_to_its_pair():
    codes = unpack(torch.arange(256, dtype=torch.uint8).view(-1, 1), INT4, 2)
    assert codes.tolist() == [[(b & 15) - 8, (b >> 4) - 8] for b in range(256)]


def test_every_int8_code_survives():
    codes = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    packed = pack(codes, INT8)
    assert packed.dtype == torch.int8 and torch.equal(unpack(packed, INT8, 64), codes)


@given(st.data(), qtypes, st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_round_trip_of_any_shape_and_layout(data, qtype, n, k, transposed):
    values = st.lists(st.integers(qtype.qmin, qtype.qmax), min_size=n * k, max_size=n * k)
    codes = torch.tensor(data.draw(values, label="codes"), dtype=torch.int8).view(n, k)
    codes = codes.t().contiguous().t() if transposed else codes
    packed = pack(codes, qtype)
    assert packed.shape == (n, packed_columns(qtype, k)) and packed.is_contiguous()
    assert torch.equal(unpack(packed, qtype, k), codes)
    assert torch.equal(unpack(packed.t().contiguous().t(), qtype, k), codes)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_odd_rows_are_padded_with_code_zero(k):
    packed = pack(torch.full((1, k), 7, dtype=torch.int8), INT4)
    assert packed[0, -1].item() >> 4 == 8
