"""7 fuse: what surrounds a quantised matmul moves into it.

    view(op(view(x, -1, K)), ...)   ->  op(x)                                 GPT-2's Conv1D
    add(op(x), b[N])                ->  op(x, bias=b)
    op(x, ids).add_(b[ids])         ->  op(x, ids, bias=b)                    experts, b [E, N]
    relu | gelu | silu (op(x))      ->  op(x, activation=...)
    mul(op_g(x, act), op_u(x))      ->  op(x, cat(g, u), act, gated)          [2N, K] -> [..., N]
    act(g) * u, g, u = op(x).chunk  ->  op(x, act, gated)                     or every other column
    add(op(x), r[..., N])           ->  op(x, residual=r)
    op_q(x), op_k(x), op_v(x)       ->  op(x, cat(q, k, v)) then a slice of the columns each

A node moves only where nothing between the places writes to memory or switches a mode, and only if
shape and dtype stay as they were. Where x needs a gradient only biases and siblings are fused. What
follows a reshaping of the result (experts in [tokens, k, N] or [E, C, N]) is fused ahead of it.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from fqcompile.passes.absorb import (
    absorb,
    is_plain,
    op_under,
    put_in_place,
    replace_by,
    same_value,
    sole_user,
)
from fqcompile.passes.base import GraphState, erase_unused, example, same_shape
from fqcompile.passes.effects import effects_between
from fqcompile.passes.expert_bias import bias_per_expert, is_even_routing
from fqcompile.passes.gated import MULTIPLIES, activation_name, gated_unit
from fqcompile.passes.op_nodes import argument, changed, is_linear, is_quantized
from fqcompile.passes.stacking import can_stack, stack
from fqcompile.torch_compat import is_erased
from fqcompile.weights.recipe import target_name

_ADDS = ("add", "__add__", "iadd")
_VIEWS = ("view", "reshape")


def fuse(state: GraphState) -> int:
    """Apply the rules in turn until none applies any more; returns the number of fusions."""
    rules = [_fuse_views, _fuse_bias, _fuse_expert_bias, _fuse_siblings]
    if not state.grad_possible:
        rules[3:3] = [_fuse_activation, _fuse_gated, _fuse_halves, _fuse_residual]
    total = 0
    while count := sum(_everywhere(state, rule) for rule in rules):
        total += count
    return total


Rule = Callable[[GraphState, fx.Node], bool]


def _everywhere(state: GraphState, rule: Rule) -> int:
    count = 0
    for node in list(state.graph.nodes):
        if not is_erased(node) and rule(state, node):
            count += 1
            state.matched.append(f"{rule.__name__.removeprefix('_fuse_')}: {node.name}")
    return count


def _fuse_views(state: GraphState, node: fx.Node) -> bool:
    """The op takes any leading dimensions, so flattening them around it is not needed."""
    op = node.args[0] if node.args else None
    if target_name(node.target) not in _VIEWS or not is_linear(op):
        return False
    assert isinstance(op, fx.Node)
    flat = argument(op, "x")
    if target_name(flat.target) not in _VIEWS or not flat.args:
        return False
    if argument(op, "residual") is not None:
        return False
    x, out = example(flat.args[0]), example(node)
    if x is None or out is None or not x.is_contiguous():
        return False
    if x.dtype != flat.meta["example_value"].dtype or out.dtype != op.meta["example_value"].dtype:
        return False  # view(dtype) reads the same bytes as other numbers
    if not same_shape(out.shape, (*x.shape[:-1], argument(op, "n"))):
        return False
    whole_rows = same_shape(x.shape[-1:], (argument(op, "k"),))
    if not (whole_rows and sole_user(op, node)) or effects_between(op, node):
        return False
    replace_by(state, op, None, node, x=flat.args[0])
    erase_unused(state.graph, [flat])
    return True


def _fuse_bias(state: GraphState, node: fx.Node) -> bool:
    op, bias = _sum_with_op(node)
    if op is None or argument(op, "bias") is not None or not is_plain(op):
        return False
    value, out = example(bias), example(node)
    if value is None or out is None or value.dtype != out.dtype:
        return False
    row = same_shape(value.shape, (argument(op, "n"),))
    return row and absorb(state, op, None, node, bias=bias)


def _fuse_residual(state: GraphState, node: fx.Node) -> bool:
    op, residual = _sum_with_op(node)
    if op is None or argument(op, "residual") is not None:
        return False
    value, out = example(residual), example(node)
    if value is None or out is None or value.dtype != out.dtype:
        return False
    return same_shape(value.shape, out.shape) and absorb(state, op, None, node, residual=residual)


def _fuse_expert_bias(state: GraphState, node: fx.Node) -> bool:
    """A sum, or one in place whose first term is read by nobody before."""
    name = target_name(node.target)
    if name not in (*_ADDS, "add_") or len(node.args) != 2 or node.kwargs:
        return False
    for value, term in (node.args, node.args[::-1])[: 1 if name in ("iadd", "add_") else 2]:
        op, view = op_under(value, sole=name != "add_")
        if op is None or is_linear(op) or argument(op, "bias") is not None or not is_plain(op):
            continue
        bias = _expert_bias(state, op, term, node)
        if bias is not None and _absorb_sum(state, op, view, node, bias):
            return True
    return False


def _expert_bias(state: GraphState, op: fx.Node, term: object, node: fx.Node) -> fx.Node | None:
    """The biases [E, N], ahead of `node`."""
    value, out = example(term), example(node)
    if not isinstance(term, fx.Node) or value is None or out is None or value.dtype != out.dtype:
        return None
    experts, n = state.packed[op].spec.experts, argument(op, "n")
    if same_shape(value.shape, out.shape):
        return bias_per_expert(op, term, experts, state.written)
    # [E, 1, .., N] beside [E, C, .., N]: of fewer dimensions, E would meet another than the first
    if is_even_routing(op, experts) and same_shape(
        value.shape, (experts, *(1,) * (out.dim() - 2), n)
    ):
        with state.graph.inserting_before(node):
            bias = state.graph.call_method("reshape", (term, (experts, n)))
        bias.meta["example_value"] = value.reshape(experts, n)
        return bias
    return None


def _absorb_sum(
    state: GraphState, op: fx.Node, view: fx.Node | None, node: fx.Node, bias: fx.Node
) -> bool:
    """As `absorb`; an op that the sum is written to may be read after it as well."""
    if target_name(node.target) != "add_" or view is not None:
        return absorb(state, op, view, node, bias=bias)
    if any(user < node for user in op.users) or not same_value(node, op):
        return False
    if effects_between(op, node):
        return False
    op.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return absorb(state, op, None, node, bias=bias)


def _fuse_activation(state: GraphState, node: fx.Node) -> bool:
    name = activation_name(node)
    op, view = op_under(node.args[0]) if name is not None and node.args else (None, None)
    return op is not None and is_plain(op) and absorb(state, op, view, node, activation=name)


def _fuse_gated(state: GraphState, node: fx.Node) -> bool:
    if target_name(node.target) not in MULTIPLIES or len(node.args) != 2 or node.kwargs:
        return False
    for gate_side, up_side in (node.args, node.args[::-1]):
        (gate, view), (up, up_view) = op_under(gate_side), op_under(up_side)
        if gate is None or up is None or not _is_gate_and_up(gate, up):
            continue
        if not all(sole_user(side, node) for side in (gate_side, up_side)):
            continue
        assert isinstance(gate_side, fx.Node)
        same = same_value(node, gate_side) and (view is None) == (up_view is None)
        if same and can_stack(state, [gate, up], min(gate, up), node):
            n, act = argument(up, "n"), argument(gate, "activation")
            fused = stack(state, [gate, up], node, n=n, activation=act, gated=True)
            put_in_place(state, fused, view, node)
            return True
    return False


def _fuse_halves(state: GraphState, node: fx.Node) -> bool:
    """The gated unit over the halves of one op's columns; interleaved ones are packed apart."""
    unit = gated_unit(node)
    op, view = (None, None) if unit is None else op_under(unit.value, sole=False)
    value, out = example(node), None if unit is None else example(unit.value)
    if op is None or unit is None or value is None or out is None or not is_plain(op):
        return False
    n, pair = argument(op, "n"), state.packed[op]
    halved = (*out.shape[:-1], n // 2)
    if value.dtype != out.dtype or not same_shape(value.shape, halved) or not value.is_contiguous():
        return False
    if (unit.interleaved and len(pair.spec.parts) > 1) or effects_between(op, node):
        return False
    bias = argument(op, "bias")
    with state.graph.inserting_before(node):
        if bias is not None and unit.interleaved:
            bias = _gate_then_up(state.graph, bias)
        changes = {"n": n // 2, "activation": unit.activation, "gated": True, "bias": bias}
        fused = state.graph.call_function(*changed(op, **changes))
    spec = replace(pair.spec, interleaved=unit.interleaved)
    del state.packed[op]
    state.replace_op([op], fused, replace(pair, spec=spec))
    put_in_place(state, fused, view, node)
    return True


def _gate_then_up(graph: fx.Graph, bias: fx.Node) -> fx.Node:
    """The columns 0, 2, 4, ... before 1, 3, 5, ..."""
    value = example(bias)
    assert value is not None
    pairs = graph.call_method("unflatten", (bias, -1, (-1, 2)))
    swapped = graph.call_method("transpose", (pairs, -1, -2))
    flat = graph.call_method("flatten", (swapped, -2))
    flat.meta["example_value"] = value
    return flat


def _fuse_siblings(state: GraphState, node: fx.Node) -> bool:
    """Triggered at the first of the siblings, which is where the fused op stands."""
    if not is_quantized(node) or not is_plain(node):
        return False
    x = argument(node, "x")
    group = [u for u in sorted(x.users) if is_quantized(u) and _reads_the_same(u, node)]
    # Those before this one have had their turn, and did not take it.
    group = [u for u in group if not u < node and is_plain(u) and _alike(u, node)]
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
    pairs = [(op, other) for op, other in ordered if is_linear(op) and sole_user(op, node)]
    return pairs[0] if pairs else (None, None)


def _reads_the_same(a: fx.Node, b: fx.Node) -> bool:
    """Equal operators on one x, with one routing."""
    same = all(argument(a, name) is argument(b, name) for name in ("x", "routing", "zero_rest"))
    return same and a.target is b.target


def _is_gate_and_up(gate: fx.Node, up: fx.Node) -> bool:
    return (
        gate is not up
        and _reads_the_same(gate, up)
        and argument(gate, "n") == argument(up, "n")
        and argument(gate, "activation") != "none"
        and not argument(gate, "gated")
        and argument(gate, "residual") is None
        and is_plain(up)
        and _alike(gate, up)
    )


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
