"""Words of codes, against the library that defines them and against arithmetic on numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.tensor.codes import pack, unpack
from fqcompile.tensor.format import INT4, INT8, QTYPES, UNIFORM, Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.tensor.words import from_words, to_words, widen

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))


def codes_of(bits: int, n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        -(1 << bits - 1), 1 << bits - 1, (n, k), generator=generator, dtype=torch.int8
    )


def words_by_numbers(codes: torch.Tensor, bits: int) -> np.ndarray:
    """Each row as one long number, cut into pieces of 32 bits."""
    rows = []
    for row in codes.tolist():
        number = sum((code + (1 << bits - 1)) << bits * j for j, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([number >> 32 * i & 0xFFFFFFFF for i in range(count)])
    return np.array(rows, dtype=np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [4, 8])
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_words_are_the_numbers_that_the_format_says(
    bits: int, shape: tuple[int, int], seed: int
) -> None:
    codes = codes_of(bits, *shape, seed)
    storage = pack(codes, QTYPES[bits, UNIFORM])
    before = storage.clone()
    words = to_words(storage, bits, shape[1])
    assert torch.equal(storage, before), "the codes themselves were changed"
    assert np.array_equal(words.numpy(), words_by_numbers(codes, bits))
    assert torch.equal(from_words(words, bits, shape[1]), storage)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 7, 8, 32, 33, 96])
def test_the_library_packs_and_unpacks_the_same(bits: int, k: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(bits, 3, k, k)
    words = to_words(pack(codes, QTYPES[bits, UNIFORM]), bits, k)
    assert torch.equal(words, helpers.pack_to_int32(codes, bits))
    assert torch.equal(helpers.unpack_from_int32(words, bits, codes.shape), codes)


@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_wider_codes_are_the_same_numbers(shape: tuple[int, int], seed: int) -> None:
    codes = codes_of(4, *shape, seed)
    scale = torch.rand(shape[0], 1)
    weight = QuantizedTensor(pack(codes, INT4), scale, Format(4, shape[1], *shape))
    wide = widen(weight)
    assert wide.bits == 8
    assert torch.equal(unpack(wide.qweight, INT8, shape[1]), codes)
    assert torch.equal(wide.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert widen(wide) is wide
