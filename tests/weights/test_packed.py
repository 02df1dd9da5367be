"""NodeWeight: several sites' codes stacked along the rows, taken apart again, at one group size."""

from dataclasses import replace

import pytest
import torch

from fqcompile.kernels.template import PLAIN, Layout
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.node_weight import NodeWeight, Part, common_group_size
from fqcompile.weights.recipe import IDENTITY, TRANSPOSE

K = 100


def plan(group_size: int, bits: int = 4) -> QuantPlan:
    return QuantPlan(bits, group_size, "mse", torch.float32, 0.0)


def part(rows: int, group_size: int, inputs: tuple[int, ...] = (0,), bits: int = 4) -> Part:
    return Part(IDENTITY, inputs, plan(group_size, bits), rows, K)


def quantized(rows: int, group_size: int, seed: int = 0) -> QuantizedTensor:
    w = torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))
    return quantize_weight(w, plan(group_size))


def test_stack_and_slices_are_inverse_and_lose_nothing() -> None:
    """Column, 64 and 32 meet at 32; K = 100 leaves a short last group in each."""
    sizes = [K, 64, 32]
    weights = [quantized(3 + i, size, seed=i) for i, size in enumerate(sizes)]
    spec = NodeWeight(tuple(part(3 + i, size, (i,)) for i, size in enumerate(sizes)), 32)
    stacked = spec.stack(weights)
    assert (stacked.shape, stacked.group_size) == ((12, K), 32)
    assert stacked.scale.shape == (12, 4)
    views = list(spec.slices(stacked))
    for before, view in zip(weights, views, strict=True):
        assert torch.equal(view.dequantize(torch.float32), before.dequantize(torch.float32))
        assert (
            view.qweight.untyped_storage().data_ptr()
            == stacked.qweight.untyped_storage().data_ptr()
        )
        assert view.scale.untyped_storage().data_ptr() == stacked.scale.untyped_storage().data_ptr()


def test_one_part_at_its_own_group_size_is_not_copied() -> None:
    weight = quantized(3, 32)
    assert NodeWeight((part(3, 32),), 32).stack([weight]).qweight is weight.qweight


def test_facts_of_a_spec_come_from_its_parts() -> None:
    spec = NodeWeight((part(3, 64, (4,)), part(5, 32, (1, 2))), 32)
    assert (spec.rows, spec.k, spec.bits, spec.scale_dtype) == (8, K, 4, torch.float32)
    assert spec.inputs == (4, 1, 2)
    given = list(torch.zeros(3))
    assert [len(own) for _, own in spec.part_sources(given)] == [1, 2]
    assert [own for _, own in spec.part_sources(given)][1] == tuple(given[1:])


def test_key_tells_formats_apart_but_not_graph_inputs_or_errors() -> None:
    def spec(**changes: object) -> NodeWeight:
        values = {"bits": 4, "group_size": 64, "scale_method": "mse", "scale_dtype": torch.float32}
        own = QuantPlan(**{**values, "relative_error": 0.5, **changes})
        return NodeWeight((Part(IDENTITY, (0,), own, 3, K),), 32)

    same = spec()
    assert same.key == NodeWeight((part(3, 64, (9,)),), 32).key
    others = [
        spec(bits=8),
        spec(group_size=32),
        spec(scale_method="absmax"),
        spec(scale_dtype=torch.float16),
        NodeWeight(same.parts, 64),
        replace(same, layout=Layout("other", PLAIN.pack_matrix, PLAIN.shapes)),
        NodeWeight((Part(TRANSPOSE, (0,), plan(64), 3, K),), 32),
        NodeWeight((*same.parts, *same.parts), 32),
    ]
    assert len({str(s.key) for s in [same, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("sizes", "common"),
    [
        ((K,), K),
        ((K, K), K),
        ((K, 64), 64),
        ((64, 32), 32),
        ((32, 64, K), 32),
        ((48, 64), None),
        ((48, 64, K), None),
        ((48, 24), 24),
    ],
    ids=str,
)
def test_common_group_size(sizes: tuple[int, ...], common: int | None) -> None:
    assert common_group_size([NodeWeight((part(3, size),), size) for size in sizes]) == common


def expert_part(experts: int, rows: int, group_size: int, index: int = 0) -> Part:
    return Part(IDENTITY, (index,), plan(group_size), rows, K, experts)


def expert_weights(experts: int, rows: int, group_size: int, seed: int = 0) -> QuantizedTensor:
    w = torch.randn(experts, rows, K, generator=torch.Generator().manual_seed(seed))
    return quantize_weight(w, plan(group_size))


def test_experts_are_packed_one_by_one_in_every_layout() -> None:
    flipped = lambda w: (w.qweight.flip(0), w.scale.flip(0))  # noqa: E731
    reversed_rows = Layout("reversed", flipped, PLAIN.shapes)
    weight = expert_weights(3, 4, 32)
    plain, other = PLAIN.pack(weight).tensors, reversed_rows.pack(weight).tensors
    assert plain[0].shape == (3, 4, K // 2) and plain[1].shape == (3, 4, 4)
    assert plain[0].data_ptr() == weight.qweight.data_ptr(), "the plain layout is a view"
    for made, straight in zip(other, plain, strict=True):
        assert torch.equal(made, straight.flip(1))


def test_gate_and_up_of_experts_meet_in_each_expert() -> None:
    spec = NodeWeight((expert_part(2, 3, 64, 0), expert_part(2, 5, 32, 1)), 32)
    weights = [expert_weights(2, 3, 64, 1), expert_weights(2, 5, 32, 2)]
    assert (spec.rows, spec.experts) == (8, 2)
    stacked = spec.stack(weights).dequantize(torch.float32)
    parts = [w.dequantize(torch.float32) for w in weights]
    assert torch.equal(stacked, torch.cat(parts, 1))
    assert list(spec.slices(spec.stack(weights))) == [None, None], "no part lies in one piece"


def test_interleaved_rows_are_packed_gate_first_and_have_a_key_of_their_own() -> None:
    straight = NodeWeight((expert_part(2, 6, 32),), 32)
    interleaved = NodeWeight((expert_part(2, 6, 32),), 32, interleaved=True)
    weight = expert_weights(2, 6, 32)
    assert interleaved.key != straight.key
    want = straight.stack([weight]).dequantize(torch.float32)
    got = interleaved.stack([weight]).dequantize(torch.float32)
    assert torch.equal(got, torch.cat([want[:, ::2], want[:, 1::2]], 1))
    assert list(interleaved.slices(weight)) == [None]
