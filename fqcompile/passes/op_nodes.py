"""The nodes of quantized matmuls: access to arguments by name, and replacement by fused ops.

An op that absorbs a later node takes that node's place; several ops that read the same x become one
op, whose weights are concatenated along the rows.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fqcompile.kernels.op import matmul, matmul_inference
from fqcompile.passes.effects import effects_between
from fqcompile.passes.state import (
    GraphState,
    erase_dead,
    example,
    same_layout,
    same_shape,
)
from fqcompile.torch_compat import schema_of
from fqcompile.weights.node_weight import NodeWeight, common_group_size
from fqcompile.weights.recipe import target_name

ADDS = ("add", "__add__", "iadd")
MATMUL, INFERENCE = matmul, matmul_inference  # the second if no gradient can flow
OWN = "packed input"  # in the meta of inputs that `rewrite` adds
_NAMES = [argument.name for argument in schema_of(matmul).arguments]
_UNROUTED = {"offsets": None, "ids": None, "zero_rest": False}


def is_quantized(node: object) -> bool:
    """Whether the node is a call of the operator that `rewrite` made, for a matrix or experts.

    A graph may have others from the start: those of an exported program with packed weights.
    """
    if not isinstance(node, fx.Node) or node.target not in (MATMUL, INFERENCE):
        return False
    codes = node.args[1] if len(node.args) > 1 else None
    return isinstance(codes, fx.Node) and OWN in codes.meta


def is_linear(node: object) -> bool:
    """Whether the node is a call of the operator for one matrix."""
    return is_quantized(node) and argument(node, "routing") is None  # type: ignore[arg-type]


def argument(node: fx.Node, name: str) -> Any:
    """An argument by its schema name; `routing` is the offsets or ids of experts."""
    given = _arguments(node)
    if name == "routing":
        return given["ids"] if given["offsets"] is None else given["offsets"]
    return given[name]


def changed(node: fx.Node, **changes: Any) -> tuple[Any, tuple[Any, ...]]:
    """(operator, arguments) of a node with some arguments changed."""
    return node.target, matmul_arguments(*node.args, **changes)


def matmul_arguments(*given: Any, **named: Any) -> tuple[Any, ...]:
    """All arguments by position, as in the nodes; without a routing if none is given."""
    known = _UNROUTED | dict(zip(_NAMES, given, strict=False)) | named
    assert known.keys() == set(_NAMES), f"the operator has {_NAMES}, not {[*known]}"
    return tuple([known[name] for name in _NAMES])


def _arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_NAMES, node.args, strict=True))


def is_plain(op: fx.Node) -> bool:
    """Nothing but a bias follows the matmul yet."""
    return (
        argument(op, "activation") == "none"
        and not argument(op, "gated")
        and argument(op, "residual") is None
    )


def sole_user(op: object, user: fx.Node) -> bool:
    return isinstance(op, fx.Node) and list(op.users) == [user]


def same_value(a: fx.Node, b: fx.Node) -> bool:
    left, right = example(a), example(b)
    if left is None or right is None or left.dtype != right.dtype:
        return False
    return same_shape(left.shape, right.shape) and same_layout(left, right)


def op_under(value: object, sole: bool = True) -> tuple[fx.Node | None, fx.Node | None]:
    """(op, None) if the value is an op; (op, view) if it is the only user, a reshape of its rows.

    `sole`: the value must have exactly one user. (None, None) if it is neither.
    """
    if not isinstance(value, fx.Node) or (sole and len(value.users) != 1):
        return None, None
    if is_quantized(value):
        return value, None
    inner = value.args[0] if target_name(value.target) == "reshape" and value.args else None
    if not is_quantized(inner) or is_linear(inner) or not sole_user(inner, value):
        return None, None
    assert isinstance(inner, fx.Node)
    rows, shaped = example(inner), example(value)
    if rows is None or shaped is None or not same_shape(rows.shape[-1:], shaped.shape[-1:]):
        return None, None
    return (inner, value) if isinstance(value.args[1], list | tuple) else (None, None)


def sum_with_op(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(op, other) of a plain sum `op + other`, else (None, None)."""
    name = target_name(node.target)
    if name not in ADDS or len(node.args) != 2 or node.kwargs:
        return None, None
    # If both terms are linears, the later one absorbs the sum.
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None, None
    ordered = [(first, second), (second, first)]
    if name == "iadd":
        ordered.pop()  # it writes to `first`, which others may read
    elif first < second:
        ordered.reverse()
    pairs = [(op, other) for op, other in ordered if is_linear(op) and sole_user(op, node)]
    return pairs[0] if pairs else (None, None)


def absorb(
    state: GraphState, op: fx.Node, view: fx.Node | None, node: fx.Node, **changes: object
) -> bool:
    """Let `op`, whose only user is `view` or `node`, compute node's value in node's place."""
    value = op if view is None else view
    if not (sole_user(value, node) and same_value(node, value)) or effects_between(op, node):
        return False
    replace_by(state, op, view, node, **changes)
    return True


def replace_by(
    state: GraphState, op: fx.Node, view: fx.Node | None, node: fx.Node, **changes: object
) -> None:
    with state.graph.inserting_before(node):
        fused = state.graph.call_function(*changed(op, **changes))
    state.replace_op([op], fused, state.packed.pop(op))
    put_in_place(state, fused, view, node)


def put_in_place(state: GraphState, fused: fx.Node, view: fx.Node | None, node: fx.Node) -> None:
    """Replace `node` by `fused`, reshaped as `view` if given, and erase what is then unused."""
    value = fused
    if view is not None:
        shape, n = view.args[1], argument(fused, "n")
        rows, out = example(argument(fused, "x")), example(node)
        assert isinstance(shape, list | tuple) and rows is not None and out is not None
        fused.meta["example_value"] = out.new_empty((rows.shape[0], n))
        with state.graph.inserting_before(node):
            value = state.graph.call_method("reshape", (fused, (*shape[:-1], n)))
    value.meta = dict(node.meta)
    inputs = node.all_input_nodes
    node.replace_all_uses_with(value)
    state.graph.erase_node(node)
    erase_dead(state, inputs)


def can_stack(
    state: GraphState,
    ops: Sequence[fx.Node],
    first: fx.Node,
    last: fx.Node,
    *,
    at_first: bool = False,
) -> bool:
    """Whether one op can replace all: equal formats, no effects between, biases known before."""
    specs = [state.packed[op] for op in ops]
    formats = {(spec.bits, spec.levels, spec.k, spec.scale_dtype, spec.experts) for spec in specs}
    if len(formats) > 1 or common_group_size(specs) is None or effects_between(first, last):
        return False
    biases = [bias for op in ops if (bias := argument(op, "bias")) is not None]
    return not at_first or all(bias < first for bias in biases)


def stack(state: GraphState, ops: Sequence[fx.Node], place: fx.Node, **changes: Any) -> fx.Node:
    """Replace `ops` by one op before `place` with their rows stacked, for experts those of each.

    With `changes` (a gated pair) the caller replaces the nodes that the op computes. Otherwise each
    former op becomes a slice of the result's columns, copied so that results share no memory, as
    before.
    """
    weights = [state.packed.pop(op) for op in ops]
    group_size = common_group_size(weights)
    assert group_size is not None
    stacked = NodeWeight(tuple(part for weight in weights for part in weight.parts), group_size)
    unread = [argument(op, name) for op in ops[1:] for name in ("qweight", "scale")]
    rows = [argument(op, "n") for op in ops]
    with state.graph.inserting_before(place):
        biases = [argument(op, "bias") for op in ops]
        dim = 0 if is_linear(ops[0]) else 1
        bias = None
        if biases[0] is not None:
            bias = state.graph.call_function(torch.cat, (biases, dim))
        settings = {"n": sum(rows), "bias": bias, "group_size": group_size, **changes}
        fused = state.graph.call_function(*changed(ops[0], **settings))
        state.replace_op(ops, fused, stacked)
        if not changes:
            _slice_columns(state.graph, ops, rows, fused)
    for op in ops:
        op.replace_all_uses_with(fused)
        state.graph.erase_node(op)
    for node in unread:
        state.graph.erase_node(node)
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
