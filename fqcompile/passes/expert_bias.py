"""The fusion of biases [E, N], one for each expert, into the matmul of the experts.

op(x, ids=ids) + b[ids]                              gathered experts
op(x, offsets=o) + b[sorted_ids]                     grouped experts, where o counts those ids
op(x, offsets=arange(1, E + 1) * C) + b [E, 1, N]    each expert with C rows
"""

from collections.abc import Container, Iterator
from typing import Any

from torch import fx

from fqcompile.passes.effects import effects_between
from fqcompile.passes.fuse_patterns import bound_arguments, is_call
from fqcompile.passes.gather import whole_rows
from fqcompile.passes.op_nodes import (
    ADDS,
    absorb,
    argument,
    is_linear,
    is_plain,
    op_under,
    same_value,
)
from fqcompile.passes.state import GraphState, example, same_shape
from fqcompile.weights.recipe import target_name

_CASTS = ("to", "int", "long", "float", "type", "contiguous")
_RESHAPES = ("reshape", "view", "flatten")


def expert_bias(state: GraphState, node: fx.Node) -> bool:
    """op(x, ids=ids) + b[ids] -> op(x, b, ids=ids), for b [E, N]; see `_bias_per_expert`

    op(x, offsets=arange(1, E + 1) * C) + b [E, 1, N] -> op(x, b.reshape(E, N), offsets=...)

    Also for an in-place sum, if nothing else reads its first term before the sum.
    """
    if not is_call(node, (*ADDS, "add_"), 2):
        return False
    in_place = is_call(node, ("iadd", "add_"))
    for value, term in (node.args, node.args[::-1])[: 1 if in_place else 2]:
        op, view = op_under(value, sole=not is_call(node, ("add_",)))
        if op is None or is_linear(op) or argument(op, "bias") is not None or not is_plain(op):
            continue
        bias = _biases(state, op, term, node)
        if bias is not None and _absorb_sum(state, op, view, node, bias):
            return True
    return False


def _biases(state: GraphState, op: fx.Node, term: object, node: fx.Node) -> fx.Node | None:
    """The node of the biases [E, N], created before `node` if needed; None if `term` is none."""
    value, out = example(term), example(node)
    if not isinstance(term, fx.Node) or value is None or out is None or value.dtype != out.dtype:
        return None
    experts, n = state.packed[op].experts, argument(op, "n")
    if same_shape(value.shape, out.shape):
        return _bias_per_expert(op, term, experts, state.written)
    # [E, 1, .., N] with [E, C, .., N]: with fewer dimensions, E would not broadcast to the first.
    each = (experts, *(1,) * (out.dim() - 2), n)
    if not (is_even_routing(op, experts) and same_shape(value.shape, each)):
        return None
    with state.graph.inserting_before(node):
        bias = state.graph.call_method("reshape", (term, (experts, n)))
    bias.meta["example_value"] = value.reshape(experts, n)
    return bias


def _absorb_sum(
    state: GraphState, op: fx.Node, view: fx.Node | None, node: fx.Node, bias: fx.Node
) -> bool:
    """Like `absorb`, but an op that the sum writes to in place may have readers after the sum."""
    if not is_call(node, ("add_",)) or view is not None:
        return absorb(state, op, view, node, bias=bias)
    read_before = any(user < node for user in op.users)
    if read_before or not same_value(node, op) or effects_between(op, node):
        return False
    op.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return absorb(state, op, None, node, bias=bias)


def _bias_per_expert(
    op: fx.Node, term: fx.Node, experts: int, written: Container[fx.Node]
) -> fx.Node | None:
    """The node of the biases [E, N], or None if `term` is not a bias of the rows' experts.

    matmul(x, .., ids=ids) + b[ids]              ->  b
    matmul(x, .., offsets=o) + b[sorted_ids]     ->  b, if o counts those ids

    Also None if anything between the routing and the sum is in `written`, the nodes that may be
    written to: the fused op reads biases and routing earlier than the sum did.
    """
    picked = _picked(_without(term, _RESHAPES))
    if picked is None:
        return None
    bias, ids = picked
    read = {*_between(term, bias), *_between(argument(op, "routing"), ids), bias, ids}
    if any(node in written for node in read):
        return None
    value = example(bias)
    if value is None or not same_shape(value.shape, (experts, argument(op, "n"))):
        return None
    routing = argument(op, "routing")
    if argument(op, "ids") is not None:
        return bias if ids is _without(routing, _RESHAPES) or ids is routing else None
    return bias if _is_sorted(ids) and ids is _counted(routing, experts) else None


def is_even_routing(op: fx.Node, experts: int) -> bool:
    """Whether every expert has equally many rows: offsets 1, 2, ..., E times one number."""
    routing = argument(op, "routing")
    if not is_call(routing, ("mul",)) or not routing.args:
        return False
    counts = routing.args[0]
    return is_call(counts, ("arange",)) and counts.args == (1, experts + 1)


def _picked(term: Any) -> tuple[fx.Node, fx.Node] | None:
    """(b, ids) of b[ids]."""
    if not isinstance(term, fx.Node) or len(term.args) < 2:
        return None
    by_select = is_call(term, ("index_select",)) and term.args[1] == 0
    if not by_select and not is_call(term, ("getitem",)):
        return None
    source, index = term.args[0], whole_rows(term.args[-1])
    both = isinstance(source, fx.Node) and isinstance(index, fx.Node)
    return (source, index) if both else None  # type: ignore[return-value]


def _counted(offsets: Any, experts: int) -> fx.Node | None:
    """The ids if `offsets` are their running counts, cumsum(histc(ids)); else None."""
    total = _without(offsets, _CASTS)
    if not is_call(total, ("cumsum",)):
        return None
    counts = _without(total.args[0] if total.args else None, _CASTS)
    if not is_call(counts, ("histc",)) or not counts.args:
        return None
    if bound_arguments(counts, "input", "bins", "min", "max")[1:] != [experts, 0, experts - 1]:
        return None
    ids = _without(counts.args[0], _CASTS)
    return ids if isinstance(ids, fx.Node) else None


def _is_sorted(ids: fx.Node) -> bool:
    """Whether `ids` are the values (not the indices) of an ascending sort."""
    if not is_call(ids, ("getitem",)) or ids.args[1] != 0 or not is_call(ids.args[0], ("sort",)):
        return False
    sort = ids.args[0]
    assert isinstance(sort, fx.Node)
    return not sort.kwargs.get("descending") and True not in sort.args


def _between(node: Any, source: fx.Node) -> Iterator[fx.Node]:
    """The nodes on the way from `node` back to `source` along first arguments, without `source`."""
    while isinstance(node, fx.Node) and node is not source:
        yield node
        node = node.args[0] if node.args else None


def _without(node: Any, names: tuple[str, ...]) -> Any:
    """The node with trailing calls of these names stripped off."""
    while isinstance(node, fx.Node) and target_name(node.target) in names and node.args:
        node = node.args[0]
    return node
