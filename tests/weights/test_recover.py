"""What was stacked and packed comes back part by part, bit for bit; nothing is quantized twice."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.kernels.cpu.aten_packed import ATEN_INT4_CPU
from fqcompile.kernels.cpu.stream import STREAM
from fqcompile.kernels.registry import TEMPLATES
from fqcompile.kernels.template import PLAIN, Layout
from fqcompile.quant.choose import QuantPlan
from fqcompile.tensor.format import Format, num_groups
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.node_weight import NodeWeight, Part, common_group_size
from fqcompile.weights.recipe import IDENTITY
from fqcompile.weights.store import WeightStore
from tests.strategies import random_codes

LAYOUTS = {
    t.layout.name: t.layout for t in TEMPLATES.values() if t.layout.unpack_matrix is not None
}


def plan(
    bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16, levels: str = "uniform"
) -> QuantPlan:
    return QuantPlan(bits, group_size, "mse", scale_dtype, 0.0, levels=levels)


def random_weight(part: Part, generator: torch.Generator) -> QuantizedTensor:
    rows, k, own = part.rows * max(1, part.experts), part.k, part.plan
    codes = random_codes(own.bits, rows, k, generator)
    if own.bits == 4 and k % 2:  # the half byte beyond K holds code 0
        codes[:, -1] = (codes[:, -1] & 0x0F) | 0x80
    scale = torch.randn(rows, num_groups(k, own.group_size), generator=generator)
    form = Format(own.bits, own.group_size, part.rows, k, part.experts, levels=own.levels)
    return QuantizedTensor.of_rows(codes, scale.to(own.scale_dtype), form)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@given(data=st.data())
def test_every_part_comes_back_as_it_was_stacked(layout: Layout, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]), label="bits")
    k = data.draw(st.integers(1, 200), label="k")
    experts = data.draw(st.sampled_from([0, 1, 3]), label="experts")
    interleaved = data.draw(st.booleans(), label="interleaved")
    sizes = st.sampled_from([size for size in (16, 32, 64, k) if size <= k])
    dtypes = st.sampled_from([torch.float16, torch.float32])
    parts = tuple(
        Part(
            IDENTITY,
            (index,),
            plan(bits, data.draw(sizes, label="group"), data.draw(dtypes, label="scales")),
            2 * data.draw(st.integers(1, 40), label="rows / 2"),
            k,
            experts,
        )
        for index in range(data.draw(st.integers(1, 3), label="parts"))
    )
    group_size = common_group_size([NodeWeight((p,), p.plan.group_size) for p in parts])
    assert group_size is not None
    spec = NodeWeight(parts, group_size, layout, interleaved)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    before = [random_weight(part, generator) for part in parts]
    packed = layout.pack(spec.stack(before))
    for index, weight in enumerate(before):
        after = spec.recover(packed, index)
        for name in ("qweight", "scale"):
            got, want = getattr(after, name), getattr(weight, name)
            assert got.dtype == want.dtype and torch.equal(got, want), name
        assert (after.bits, after.group_size, after.shape) == (
            weight.bits,
            weight.group_size,
            weight.shape,
        )


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """Each part that is quantized from its weight, in turn."""
    done: list[Part] = []
    quantize = Part.quantize

    def spy(self: Part, sources: tuple[Tensor, ...]) -> QuantizedTensor:
        done.append(self)
        return quantize(self, sources)

    monkeypatch.setattr(Part, "quantize", spy)
    return done


def weight(seed: int = 0) -> Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))


def part(index: int, group_size: int = 32) -> Part:
    return Part(IDENTITY, (index,), plan(4, group_size, torch.bfloat16), 64, 64)


@pytest.mark.parametrize("layout", [PLAIN, STREAM])
def test_second_form_is_made_from_the_first(layout: Layout, quantized: list[Part]) -> None:
    """Fused with a finer sibling in one graph, alone and in another layout in the next."""
    store, sources = WeightStore(), (weight(), weight(1))
    fused = NodeWeight((part(0, 64), part(1, 32)), 32, layout)
    alone = NodeWeight((part(0, 64),), 64, STREAM if layout is PLAIN else PLAIN)
    store.packed(fused, sources)
    assert len(quantized) == 2
    found = store.packed(alone, sources[:1])
    assert len(quantized) == 2
    wanted = WeightStore().packed(alone, (weight(),))
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, wanted.tensors, strict=True))
    # and back: what is held of the part now is the second form
    other = NodeWeight((part(0, 64), part(0, 64)), 64, layout)
    again = store.packed(other, (sources[0], sources[0]))
    wanted = WeightStore().packed(other, (sources[0], sources[0]))
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, wanted.tensors, strict=True))


def test_what_cannot_be_unpacked_is_quantized_again(quantized: list[Part]) -> None:
    store, sources = WeightStore(), (weight(),)
    spec = NodeWeight((part(0),), 32, ATEN_INT4_CPU)
    store.packed(spec, sources)
    store.packed(replace(spec, layout=STREAM), sources)
    assert len(quantized) == 2


def test_recovering_from_a_stack_keeps_no_dead_weight_s_rows_longer_than_needed() -> None:
    store, sources = WeightStore(), [weight(), weight(1)]
    spec = NodeWeight((part(0), part(1)), 32, STREAM)
    first = store.packed(spec, tuple(sources)).qweight.data_ptr()
    sources[1] = weight(2)
    second = store.packed(spec, tuple(sources))
    assert second.qweight.data_ptr() != first
    want = WeightStore().packed(spec, (weight(), weight(2)))
    assert all(torch.equal(a, b) for a, b in zip(second.tensors, want.tensors, strict=True))
