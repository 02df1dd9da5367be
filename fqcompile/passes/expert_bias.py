"""Which [E, N] biases a term adds to the rows of experts.

gathered_linear(x, .., ids) + b[ids]                          ->  b
grouped_linear(x, .., offsets) + b[sorted_ids]                ->  b, if offsets count those ids
grouped_linear(x, .., arange(1, E + 1) * C) + b [E, 1, N]     ->  b.reshape(E, N)
"""

from collections.abc import Container, Iterator
from typing import Any

from torch import fx

from fqcompile.passes.base import example, same_shape
from fqcompile.passes.gather import whole_rows
from fqcompile.passes.op_nodes import GATHERED, argument, training_op
from fqcompile.weights.recipe import target_name

_CASTS = ("to", "int", "long", "float", "type", "contiguous")
_RESHAPES = ("reshape", "view", "flatten")


def bias_per_expert(
    op: fx.Node, term: fx.Node, experts: int, written: Container[fx.Node]
) -> fx.Node | None:
    """The node of the biases [E, N], or None where `term` is no bias of the rows' experts.

    Nor where something between the routing and the sum may be `written` to: the op reads biases and
    routing in its own place.
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
    if training_op(op) is GATHERED:
        return bias if ids is _without(routing, _RESHAPES) or ids is routing else None
    return bias if _is_sorted(ids) and ids is _counted(routing, experts) else None


def is_even_routing(op: fx.Node, experts: int) -> bool:
    """Whether every expert has equally many rows: offsets 1, 2, ..., E times one number."""
    routing = argument(op, "routing")
    if not _is_call(routing, "mul") or not routing.args:
        return False
    counts = routing.args[0]
    return _is_call(counts, "arange") and counts.args == (1, experts + 1)


def _picked(term: Any) -> tuple[fx.Node, fx.Node] | None:
    """(b, ids) of b[ids]."""
    if not isinstance(term, fx.Node) or len(term.args) < 2:
        return None
    name, index = target_name(term.target), term.args[-1]
    if name == "index_select" and term.args[1] != 0:
        return None
    if name not in ("getitem", "__getitem__", "index_select"):
        return None
    source, index = term.args[0], whole_rows(index)
    both = isinstance(source, fx.Node) and isinstance(index, fx.Node)
    return (source, index) if both else None  # type: ignore[return-value]


def _counted(offsets: Any, experts: int) -> fx.Node | None:
    """The ids of which `offsets` are the running counts: cumsum(histc(ids))."""
    total = _without(offsets, _CASTS)
    if not _is_call(total, "cumsum"):
        return None
    counts = _without(total.args[0] if total.args else None, _CASTS)
    if not _is_call(counts, "histc") or not counts.args:
        return None
    names = ("input", "bins", "min", "max")
    call = dict(zip(names, counts.args, strict=False)) | dict(counts.kwargs)
    if [call.get(name) for name in names[1:]] != [experts, 0, experts - 1]:
        return None
    ids = _without(counts.args[0], _CASTS)
    return ids if isinstance(ids, fx.Node) else None


def _is_sorted(ids: fx.Node) -> bool:
    """Whether these are the values that an ascending sort gave."""
    if not _is_call(ids, "getitem") or ids.args[1] != 0 or not _is_call(ids.args[0], "sort"):
        return False
    sort = ids.args[0]
    assert isinstance(sort, fx.Node)
    return not sort.kwargs.get("descending") and True not in sort.args


def _is_call(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and target_name(node.target) == name


def _between(node: Any, source: fx.Node) -> Iterator[fx.Node]:
    """The node and what leads from it to `source` by first arguments."""
    while isinstance(node, fx.Node) and node is not source:
        yield node
        node = node.args[0] if node.args else None


def _without(node: Any, names: tuple[str, ...]) -> Any:
    """What the node was before calls of these names."""
    while isinstance(node, fx.Node) and target_name(node.target) in names and node.args:
        node = node.args[0]
    return node
