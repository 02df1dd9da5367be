"""6 fuse: what surrounds a quantised linear moves into it.

    view(op(view(x, -1, K)), ...)   ->  op(x)                                 GPT-2's Conv1D
    add(op(x), b[N])                ->  op(x, bias=b)
    relu | gelu | silu (op(x))      ->  op(x, activation=...)
    mul(op_g(x, act), op_u(x))      ->  op(x, cat(g, u), act, gated)          [2N, K] -> [..., N]
    add(op(x), r[..., N])           ->  op(x, residual=r)
    op_q(x), op_k(x), op_v(x)       ->  op(x, cat(q, k, v)) then a slice of the columns each

A node moves only where nothing between the places writes to memory or switches a mode, and only if
shape and dtype stay as they were. Where x needs a gradient only biases and siblings are fused.
"""

from collections.abc import Callable

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.passes.base import (
    LINEAR,
    GraphState,
    argument,
    erase_unused,
    example,
    is_linear,
    replaced_arguments,
    same_shape,
)
from fqcompile.passes.effects import effects_between
from fqcompile.passes.stacking import can_stack, stack
from fqcompile.weights.recipe import target_name

_ADDS = ("add", "__add__", "iadd")
_VIEWS = ("view", "reshape")
_MULTIPLIES = ("mul", "__mul__", "multiply")


def fuse(state: GraphState) -> int:
    """Apply the rules in turn until none applies any more; returns the number of fusions."""
    rules = [_fuse_views, _fuse_bias, _fuse_siblings]
    if not state.grad_possible:
        rules[2:2] = [_fuse_activation, _fuse_gated, _fuse_residual]
    total = 0
    while count := sum(_everywhere(state, rule) for rule in rules):
        total += count
    return total


Rule = Callable[[GraphState, fx.Node], bool]


def _everywhere(state: GraphState, rule: Rule) -> int:
    count = 0
    for node in list(state.graph.nodes):
        if not node._erased and rule(state, node):
            count += 1
            state.matched.append(f"{rule.__name__.removeprefix('_fuse_')}: {node.name}")
    return count


def _fuse_views(state: GraphState, node: fx.Node) -> bool:
    """The op takes any leading dimensions, so flattening them around it is not needed."""
    if target_name(node.target) not in _VIEWS or not is_linear(node.args[0]):
        return False
    op = node.args[0]
    assert isinstance(op, fx.Node)
    flat = argument(op, "x")
    if target_name(flat.target) not in _VIEWS or argument(op, "residual") is not None:
        return False
    x, out = example(flat.args[0]), example(node)
    if x is None or out is None or not x.is_contiguous():
        return False
    if x.dtype != flat.meta["example_value"].dtype or out.dtype != op.meta["example_value"].dtype:
        return False  # view(dtype) reads the same bytes as other numbers
    if not same_shape(out.shape, (*x.shape[:-1], argument(op, "n"))):
        return False
    whole_rows = same_shape(x.shape[-1:], (argument(op, "k"),))
    if not (whole_rows and _sole_user(op, node)) or effects_between(op, node):
        return False
    _replace_by(state, op, node, x=flat.args[0])
    erase_unused(state.graph, [flat])
    return True


def _fuse_bias(state: GraphState, node: fx.Node) -> bool:
    op, bias = _sum_with_op(node)
    if op is None or argument(op, "bias") is not None or not _is_plain(op):
        return False
    value, out = example(bias), example(node)
    if value is None or out is None or value.dtype != out.dtype:
        return False
    row = same_shape(value.shape, (argument(op, "n"),))
    return row and _absorb(state, op, node, bias=bias)


def _fuse_residual(state: GraphState, node: fx.Node) -> bool:
    op, residual = _sum_with_op(node)
    if op is None or argument(op, "residual") is not None:
        return False
    value, out = example(residual), example(node)
    if value is None or out is None or value.dtype != out.dtype:
        return False
    return same_shape(value.shape, out.shape) and _absorb(state, op, node, residual=residual)


def _fuse_activation(state: GraphState, node: fx.Node) -> bool:
    name = _activation_name(node)
    if name is None or not node.args or not is_linear(node.args[0]):
        return False
    op = node.args[0]
    assert isinstance(op, fx.Node)
    return _is_plain(op) and _absorb(state, op, node, activation=name)


def _fuse_gated(state: GraphState, node: fx.Node) -> bool:
    if target_name(node.target) not in _MULTIPLIES or len(node.args) != 2 or node.kwargs:
        return False
    for gate, up in (node.args, node.args[::-1]):
        if not (_sole_user(gate, node) and _sole_user(up, node) and _is_gate_and_up(gate, up)):
            continue
        assert isinstance(gate, fx.Node) and isinstance(up, fx.Node)
        first = min(gate, up)
        if _same_value(node, gate) and can_stack(state, [gate, up], first, node):
            n, act = argument(up, "n"), argument(gate, "activation")
            stack(state, [gate, up], node, n=n, activation=act, gated=True)
            return True
    return False


def _fuse_siblings(state: GraphState, node: fx.Node) -> bool:
    """Triggered at the first of the siblings, which is where the fused op stands."""
    if not is_linear(node) or not _is_plain(node):
        return False
    x = argument(node, "x")
    group = [u for u in sorted(x.users) if is_linear(u) and argument(u, "x") is x]
    # Those before this one have had their turn, and did not take it.
    group = [u for u in group if not u < node and _is_plain(u) and _alike(u, node)]
    group = _stackable(state, group)
    if len(group) < 2:
        return False
    stack(state, group, group[0])
    return True


def _stackable(state: GraphState, group: list[fx.Node]) -> list[fx.Node]:
    """The largest set with the first member that one op can serve, taken greedily."""
    chosen = group[:1]
    for node in group[1:]:
        if can_stack(state, [*chosen, node], chosen[0], node, at_first=True):
            chosen.append(node)
    return chosen


def _absorb(state: GraphState, op: fx.Node, node: fx.Node, **changes: object) -> bool:
    """Let `op`, whose only user is `node`, compute node's value in node's place."""
    if not (_sole_user(op, node) and _same_value(node, op)) or effects_between(op, node):
        return False
    _replace_by(state, op, node, **changes)
    return True


def _replace_by(state: GraphState, op: fx.Node, node: fx.Node, **changes: object) -> None:
    with state.graph.inserting_before(node):
        fused = state.graph.call_function(LINEAR, replaced_arguments(op, **changes))
    fused.meta = dict(node.meta)
    state.replace_op([op], fused, state.packed.pop(op))
    node.replace_all_uses_with(fused)
    state.graph.erase_node(node)
    state.graph.erase_node(op)


def _sum_with_op(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(op, other) of a plain sum `op + other`, else (None, None)."""
    name = target_name(node.target)
    if name not in _ADDS or len(node.args) != 2 or node.kwargs:
        return None, None
    # The later linear is the one that can absorb a sum of two.
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None, None
    ordered = [(first, second), (second, first)]
    if name == "iadd":
        ordered.pop()  # it writes to `first`, which others may read
    elif first < second:
        ordered.reverse()
    pairs = [(op, other) for op, other in ordered if is_linear(op) and _sole_user(op, node)]
    return pairs[0] if pairs else (None, None)


def _activation_name(node: fx.Node) -> str | None:
    name = target_name(node.target)
    if name == "gelu":
        approximate = node.kwargs.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
    known = name in ("relu", "silu", "relu_", "silu_") and not node.args[1:]
    return name.removesuffix("_") if known else None


def _is_gate_and_up(gate: object, up: object) -> bool:
    if not (is_linear(gate) and is_linear(up)) or gate is up:
        return False
    assert isinstance(gate, fx.Node) and isinstance(up, fx.Node)
    return (
        argument(gate, "x") is argument(up, "x")
        and argument(gate, "n") == argument(up, "n")
        and argument(gate, "activation") != "none"
        and not argument(gate, "gated")
        and argument(gate, "residual") is None
        and _is_plain(up)
        and _alike(gate, up)
    )


def _is_plain(op: fx.Node) -> bool:
    """Nothing but a bias follows the matmul yet."""
    return (
        argument(op, "activation") == "none"
        and not argument(op, "gated")
        and argument(op, "residual") is None
    )


def _sole_user(op: object, user: fx.Node) -> bool:
    return isinstance(op, fx.Node) and list(op.users) == [user]


def _same_value(a: fx.Node, b: fx.Node) -> bool:
    left, right = example(a), example(b)
    if left is None or right is None or left.dtype != right.dtype:
        return False
    return same_shape(left.shape, right.shape) and _same_layout(left, right)


def _same_layout(left: Tensor, right: Tensor) -> bool:
    """A sum takes the layout of its first operand, and a view after it may need that layout."""
    dims = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(statically_known_true(n == 1) or statically_known_true(s == t) for n, s, t in dims)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Equal output dtype, and both or neither with a bias."""
    left, right = example(a), example(b)
    biased = [argument(op, "bias") is not None for op in (a, b)]
    return (
        left is not None
        and right is not None
        and left.dtype == right.dtype
        and (biased[0] == biased[1])
    )
