"""Packed weights cut and joined are their dense values cut and joined, or the layer is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqcompile.checkpoint.blocks import Block, assemble, join, narrow
from fqcompile.distributed.shards import Sharding, _chunks
from fqcompile.errors import CheckpointError
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.tensor.format import INT4, INT8, NORMAL4, QTYPES, QType
from fqcompile.tensor.quantized import QuantizedTensor
from tests.tiers import examples


def _sharding(dim: int, size: int, holders: int, factor: int, own: int) -> Sharding:
    pieces = [_chunks(piece, holders) for piece in _chunks((0, size), factor)]
    return Sharding(dim, tuple(tuple(p[i] for p in pieces) for i in range(holders)), own)


def _cut(dense: torch.Tensor, sharding: Sharding, own: int) -> torch.Tensor:
    """By torch's own chunks, where they leave none out."""
    runs = [dense.narrow(sharding.dim, a, b - a) for a, b in sharding.runs[own]]
    return torch.cat(runs, sharding.dim)


def _packed(dense: torch.Tensor, transposed: bool, qtype: QType, group: int) -> QuantizedTensor:
    matrix = dense.mT if transposed else dense
    size = min(group, matrix.shape[-1])
    plan = QuantPlan(qtype.bits, size, "mse", torch.float32, 0.0, levels=qtype.levels)
    return quantize_weight(matrix.contiguous(), plan).changed(transposed=transposed)


def _dense(weight: Block) -> torch.Tensor:
    assert isinstance(weight, QuantizedTensor)
    w_hat = weight.dequantize(torch.float32)
    assert w_hat.shape == weight.shape
    return w_hat.mT if weight.format.transposed else w_hat


@pytest.mark.parametrize("factor", [1, 2])
def test_runs_are_those_of_torch_chunk(factor: int) -> None:
    index = torch.arange(24)
    for holders in (1, 2, 3, 4):
        halves = [half.chunk(holders) for half in index.chunk(factor)]
        for own in range(holders):
            wanted = torch.cat([half[own] for half in halves])
            assert torch.equal(_cut(index, _sharding(0, 24, holders, factor, own), own), wanted)
    assert _chunks((0, 3), 4) == [(0, 1), (1, 2), (2, 3), (3, 3)]


@settings(max_examples=examples(50))
@given(data=st.data())
def test_any_number_of_ranks_gets_what_any_other_saved(data: Any) -> None:
    def draw(values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    # Eight experts in two runs on each of four ranks leave none of them without one.
    experts, transposed = draw([0, 8]), draw([False, True])
    sizes = [128, 64] if transposed else [64, 128]
    dense = torch.randn(*([experts] if experts else []), *sizes)
    saved_dim, wanted_dim = draw(range(dense.dim())), draw(range(dense.dim()))
    saved_by, wanted_by = draw([1, 2, 4]), draw([1, 2, 4])
    saved = _sharding(saved_dim, dense.shape[saved_dim], saved_by, draw([1, 2]), 0)
    groups = [draw([16, 32, 1 << 20]) for _ in range(saved_by)]
    qtype = draw([*QTYPES.values()])
    parts = [
        _packed(_cut(dense, saved, number), transposed, qtype, group)
        for number, group in enumerate(groups)
    ]
    whole = _put_together(saved, [_dense(part) for part in parts], dense.shape)
    wanted = _sharding(wanted_dim, dense.shape[wanted_dim], wanted_by, draw([1, 2]), wanted_by - 1)
    block = assemble(parts.__getitem__, saved, wanted)
    assert isinstance(block, QuantizedTensor)
    assert torch.equal(_dense(block), _cut(whole, wanted, wanted.own))
    block = assemble(lambda i: _dense(parts[i]), saved, None)
    assert isinstance(block, torch.Tensor) and torch.equal(block, whole)


def _put_together(saved: Sharding, parts: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Each part's values at the indices that it holds."""
    whole = torch.empty(shape)
    for runs, part in zip(saved.runs, parts, strict=True):
        index = torch.cat([torch.arange(*run) for run in runs])
        whole.index_copy_(saved.dim, index, part)
    return whole


def test_what_cannot_be_cut_or_joined_is_said() -> None:
    dense = torch.randn(8, 120)
    block = _packed(dense, False, NORMAL4, 32)
    with pytest.raises(CheckpointError, match="column 60 is inside a group of 32"):
        narrow(block, 1, 60, 120)
    with pytest.raises(CheckpointError, match="none of it"):
        narrow(block, 0, 8, 8)
    with pytest.raises(CheckpointError, match=r"groups of \[8, 64\]"):
        join([_packed(dense[:, :64], False, INT4, 8), _packed(dense, False, INT4, 64)], 1)
    for other in (INT4, INT8):
        with pytest.raises(CheckpointError, match=r"bits and levels of .*; they must be equal"):
            join([block, _packed(dense, False, other, 32)], 0)
    sharding = Sharding(0, (((0, 8),), ((8, 16),)), 0)
    with pytest.raises(CheckpointError, match="some are not"):
        assemble(lambda i: dense if i else block, sharding, None)


@pytest.mark.parametrize("packed", [False, True])
def test_more_ranks_than_experts_leave_one_with_nothing(packed: bool) -> None:
    dense = torch.randn(2, 32, 64)
    block = _packed(dense, False, NORMAL4, 32) if packed else dense
    saved = _sharding(0, 2, 1, 1, 0)
    first, last = (_sharding(0, 2, 4, 1, own) for own in (0, 3))
    assert isinstance(assemble(lambda i: block, saved, first), type(block))
    if packed:
        with pytest.raises(CheckpointError, match="a rank would have none of it"):
            assemble(lambda i: block, saved, last)
    else:
        none = assemble(lambda i: block, saved, last)
        assert isinstance(none, torch.Tensor) and none.shape == (0, 32, 64)


def test_a_slice_inside_one_group_is_a_column() -> None:
    block = _packed(torch.randn(8, 120), False, NORMAL4, 120)
    part = narrow(block, 1, 60, 120)
    assert isinstance(part, QuantizedTensor) and part.group_size == 60
    assert torch.equal(_dense(part), _dense(block)[:, 60:])
