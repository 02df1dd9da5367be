"""Every layout that can be unpacked gives back, bit for bit, the plain one that it was made of."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.kernels.registry import TEMPLATES
from fqcompile.kernels.template import Layout
from fqcompile.tensor.format import QTYPES, Format, QType, num_groups
from fqcompile.tensor.quantized import QuantizedTensor
from tests.strategies import random_codes

LAYOUTS = {
    t.layout.name: t.layout for t in TEMPLATES.values() if t.layout.unpack_matrix is not None
}


def test_all_layouts_are_there_but_atens_whose_order_is_not_documented() -> None:
    every = {template.layout.name for template in TEMPLATES.values()}
    assert every - LAYOUTS.keys() == {"aten_int4_cpu"}
    assert {"plain", "x86_stream_1"} <= LAYOUTS.keys()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@given(
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    qtype=st.sampled_from([*QTYPES.values()]),
    group=st.sampled_from([1, 3, 16, 32, 48, 64, 128, 256, 1000]),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_what_was_packed_comes_back(
    layout: Layout,
    n: int,
    k: int,
    qtype: QType,
    group: int,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    bits, generator = qtype.bits, torch.Generator().manual_seed(seed)
    codes = random_codes(bits, n, k, generator)
    if bits == 4 and k % 2:  # the half byte beyond K holds code 0
        codes[:, -1] = (codes[:, -1] & 0x0F) | 0x80
    group = min(group, k)
    scale = torch.randn(n, num_groups(k, group), generator=generator).to(scale_dtype)
    weight = QuantizedTensor(codes, scale, Format(bits, group, n, k, levels=qtype.levels))
    back = layout.unpack(layout.pack(weight))
    assert torch.equal(back.qweight, codes) and back.qweight.dtype == codes.dtype
    assert torch.equal(back.scale, scale) and back.scale.dtype == scale_dtype
    assert back.format == weight.format
    assert back.qweight.is_contiguous() and back.scale.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@given(
    blocks=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    k=st.integers(1, 300),
    qtype=st.sampled_from([*QTYPES.values()]),
    group=st.sampled_from([16, 32, 96, 128, 1000]),
    over=st.integers(0, 63),
    seed=st.integers(0, 999),
)
def test_rows_of_what_was_packed_are_views_and_what_packing_them_gives(
    layout: Layout, blocks: list[int], k: int, qtype: QType, group: int, over: int, seed: int
) -> None:
    sizes = [64 * count for count in blocks[:-1]] + [64 * blocks[-1] - over]
    n, group, generator = sum(sizes), min(group, k), torch.Generator().manual_seed(seed)
    codes = random_codes(qtype.bits, n, k, generator)
    scale = torch.randn(n, num_groups(k, group), generator=generator).half()
    whole = QuantizedTensor(codes, scale, Format(qtype.bits, group, n, k, levels=qtype.levels))
    packed = layout.pack(whole)
    start = 0
    for rows in sizes:
        found = layout.narrow(packed, start, rows)
        expected = layout.pack(whole.narrow(start, rows))
        assert found is not None
        pairs = zip(found.tensors, expected.tensors, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) and found.format == expected.format
        codes, whole_codes = found.qweight, packed.qweight
        assert codes.untyped_storage().data_ptr() == whole_codes.untyped_storage().data_ptr()
        assert all(tensor.is_contiguous() for tensor in found.tensors)
        start += rows
    ids = torch.randint(n, (5,), generator=generator)
    taken = layout.take(packed, ids)
    assert torch.equal(taken.dequantize(torch.float32), whole.dequantize(torch.float32)[ids])
    assert torch.equal(taken.scale, whole.scale[ids])
    assert taken.format == replace(whole.format, rows=5)
    for outside in (-1, n):
        with pytest.raises(IndexError, match=f"row {outside} is out of range"):
            layout.take(packed, torch.tensor([0, outside]))


def test_rows_that_cut_a_block_have_no_view() -> None:
    weight = QuantizedTensor(
        torch.zeros(128, 8, dtype=torch.uint8), torch.ones(128, 1), Format(4, 16, 128, 16)
    )
    for name in LAYOUTS.keys() - {"plain"}:
        layout = LAYOUTS[name]
        packed = layout.pack(weight)
        assert layout.narrow(packed, 8, 64) is None
        assert layout.narrow(packed, 64, 8) is None
        assert layout.narrow(packed, 64, 64) is not None
