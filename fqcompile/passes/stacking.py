"""Stacking: several packed weights that read one input become one, row block under row block."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fqcompile.passes.base import GraphState, PackedPair, example
from fqcompile.passes.effects import effects_between
from fqcompile.passes.op_nodes import argument, changed, is_linear
from fqcompile.weights.node_weight import NodeWeight, common_group_size


def can_stack(
    state: GraphState,
    ops: Sequence[fx.Node],
    first: fx.Node,
    last: fx.Node,
    *,
    at_first: bool = False,
) -> bool:
    """Whether one op can serve all: equal formats, nothing written in between, biases at hand."""
    specs = [state.packed[op].spec for op in ops]
    formats = {(spec.bits, spec.k, spec.scale_dtype, spec.experts) for spec in specs}
    if len(formats) > 1 or common_group_size(specs) is None or effects_between(first, last):
        return False
    biases = [bias for op in ops if (bias := argument(op, "bias")) is not None]
    return not at_first or all(bias < first for bias in biases)


def stack(state: GraphState, ops: Sequence[fx.Node], place: fx.Node, **changes: Any) -> fx.Node:
    """Replace `ops` by one op standing before `place`; of experts, rows of each are stacked.

    With `changes` (a gated pair) the caller puts the op in place of what it computes; otherwise
    each former op becomes a slice of the result's columns, copied so that no two results share
    memory, as before.
    """
    pairs = [state.packed.pop(op) for op in ops]
    group_size = common_group_size([pair.spec for pair in pairs])
    assert group_size is not None
    parts = tuple(part for pair in pairs for part in pair.spec.parts)
    pair = PackedPair(pairs[0].qweight, pairs[0].scale, NodeWeight(parts, group_size))
    rows = [argument(op, "n") for op in ops]
    with state.graph.inserting_before(place):
        biases = [argument(op, "bias") for op in ops]
        dim = 0 if is_linear(ops[0]) else 1
        bias = None
        if biases[0] is not None:
            bias = state.graph.call_function(torch.cat, (biases, dim))
        settings = {"n": sum(rows), "bias": bias, "group_size": group_size, **changes}
        fused = state.graph.call_function(*changed(ops[0], **settings))
        state.replace_op(ops, fused, pair)
        if not changes:
            _slice_columns(state.graph, ops, rows, fused)
    for op in ops:
        op.replace_all_uses_with(fused)
        state.graph.erase_node(op)
    for old in pairs[1:]:
        state.graph.erase_node(old.qweight)
        state.graph.erase_node(old.scale)
    return fused


def _slice_columns(
    graph: fx.Graph, ops: Sequence[fx.Node], rows: list[int], fused: fx.Node
) -> None:
    value = example(ops[0])
    assert value is not None
    fused.meta["example_value"] = value.new_empty((*value.shape[:-1], sum(rows)))
    starts = [0, *accumulate(rows)]
    for op, start, n in zip(ops, starts, rows, strict=False):
        part = graph.call_method("narrow", (fused, -1, start, n))
        own = graph.call_method("clone", (part,), {"memory_format": torch.contiguous_format})
        own.meta = dict(op.meta)
        op.replace_all_uses_with(own)
