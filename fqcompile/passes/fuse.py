"""6 fuse: fuse the operations around a quantized matmul into it, by the rules of RULES.

A fusion is legal only if no node with side effects lies between the two nodes, and if shape and
dtype are preserved. If x needs a gradient, only biases and siblings are fused. An operation after
a reshape of the result (experts in [tokens, k, N] or [E, C, N]) is fused before the reshape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fqcompile.passes.attention import fuse_attention
from fqcompile.passes.effects import effects_between
from fqcompile.passes.expert_bias import expert_bias
from fqcompile.passes.fuse_patterns import (
    MULTIPLIES,
    activation_name,
    gated_unit,
    is_call,
)
from fqcompile.passes.op_nodes import (
    absorb,
    argument,
    can_stack,
    changed,
    is_linear,
    is_plain,
    is_quantized,
    op_under,
    put_in_place,
    replace_by,
    same_value,
    sole_user,
    stack,
    sum_with_op,
)
from fqcompile.passes.state import GraphState, erase_unused, example, same_shape
from fqcompile.torch_compat import is_erased

_VIEWS = ("view", "reshape")


def fuse(state: GraphState) -> int:
    """Apply the rules in turn until none applies any more; return the number of fusions."""
    rules = [rule for rule in RULES if rule.keeps_backward or not state.grad_possible]
    total = 0
    while count := sum(_everywhere(state, rule) for rule in rules):
        total += count
    return total


def _everywhere(state: GraphState, rule: "Rule") -> int:
    count = 0
    for node in list(state.graph.nodes):
        if not is_erased(node) and rule.apply(state, node):
            count += 1
            state.matched.append(f"{rule.name}: {node.name}")
    return count


def _views(state: GraphState, node: fx.Node) -> bool:
    """view(op(view(x, -1, K)), ...) -> op(x): it takes any leading dimensions (GPT-2's Conv1D)."""
    op = node.args[0] if node.args else None
    if not is_call(node, _VIEWS) or not is_linear(op):
        return False
    assert isinstance(op, fx.Node)
    flat = argument(op, "x")
    if not is_call(flat, _VIEWS) or not flat.args or argument(op, "residual") is not None:
        return False
    x, out = example(flat.args[0]), example(node)
    if x is None or out is None or not x.is_contiguous():
        return False
    if x.dtype != flat.meta["example_value"].dtype or out.dtype != op.meta["example_value"].dtype:
        return False  # view(dtype) reinterprets the bytes
    if not same_shape(out.shape, (*x.shape[:-1], argument(op, "n"))):
        return False
    whole_rows = same_shape(x.shape[-1:], (argument(op, "k"),))
    if not (whole_rows and sole_user(op, node)) or effects_between(op, node):
        return False
    replace_by(state, op, None, node, x=flat.args[0])
    erase_unused(state.graph, [flat])
    return True


def _bias(state: GraphState, node: fx.Node) -> bool:
    """add(op(x), b[N]) -> op(x, bias=b)"""
    op, _ = sum_with_op(node)
    if op is None or not is_plain(op):
        return False
    return _absorb_term(state, node, "bias", (argument(op, "n"),))


def _residual(state: GraphState, node: fx.Node) -> bool:
    """add(op(x), r[..., N]) -> op(x, residual=r)"""
    out = example(node)
    return out is not None and _absorb_term(state, node, "residual", out.shape)


def _absorb_term(state: GraphState, node: fx.Node, name: str, shape: Sequence[object]) -> bool:
    """Fuse a sum with an op: its other term becomes the argument `name` of the op."""
    op, term = sum_with_op(node)
    if op is None or argument(op, name) is not None:
        return False
    value, out = example(term), example(node)
    if value is None or out is None or value.dtype != out.dtype:
        return False
    return same_shape(value.shape, shape) and absorb(state, op, None, node, **{name: term})


def _activation(state: GraphState, node: fx.Node) -> bool:
    """relu | gelu | silu (op(x)) -> op(x, activation=...)"""
    name = activation_name(node)
    op, view = op_under(node.args[0]) if name is not None and node.args else (None, None)
    return op is not None and is_plain(op) and absorb(state, op, view, node, activation=name)


def _gated(state: GraphState, node: fx.Node) -> bool:
    """mul(op_g(x, act), op_u(x)) -> op(x, cat(g, u), act, gated)          [2N, K] -> [..., N]"""
    if not is_call(node, MULTIPLIES, 2):
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


def _halves(state: GraphState, node: fx.Node) -> bool:
    """act(g) * u, with g, u = op(x).chunk(2, -1) or every other column -> op(x, act, gated)

    If columns are interleaved, the weight's rows are packed in the order gate, then up.
    """
    unit = gated_unit(node)
    op, view = (None, None) if unit is None else op_under(unit.value, sole=False)
    value, out = example(node), None if unit is None else example(unit.value)
    if op is None or unit is None or value is None or out is None or not is_plain(op):
        return False
    n, weight = argument(op, "n"), state.packed[op]
    halved = (*out.shape[:-1], n // 2)
    if value.dtype != out.dtype or not same_shape(value.shape, halved) or not value.is_contiguous():
        return False
    if (unit.interleaved and len(weight.parts) > 1) or effects_between(op, node):
        return False
    bias = argument(op, "bias")
    with state.graph.inserting_before(node):
        if bias is not None and unit.interleaved:
            bias = _gate_then_up(state.graph, bias)
        changes = {"n": n // 2, "activation": unit.activation, "gated": True, "bias": bias}
        fused = state.graph.call_function(*changed(op, **changes))
    del state.packed[op]
    state.replace_op([op], fused, replace(weight, interleaved=unit.interleaved))
    put_in_place(state, fused, view, node)
    return True


def _gate_then_up(graph: fx.Graph, bias: fx.Node) -> fx.Node:
    """Reorder interleaved columns: 0, 2, 4, ... and then 1, 3, 5, ..."""
    value = example(bias)
    assert value is not None
    pairs = graph.call_method("unflatten", (bias, -1, (-1, 2)))
    swapped = graph.call_method("transpose", (pairs, -1, -2))
    flat = graph.call_method("flatten", (swapped, -2))
    flat.meta["example_value"] = value
    return flat


def _siblings(state: GraphState, node: fx.Node) -> bool:
    """op_q(x), op_k(x), op_v(x) -> op(x, cat(q, k, v)), then a slice of the columns each

    Triggered at the first of the siblings, which is where the fused op stands.
    """
    if not is_quantized(node) or not is_plain(node):
        return False
    x = argument(node, "x")
    group = [u for u in sorted(x.users) if is_quantized(u) and _reads_the_same(u, node)]
    # Earlier siblings were visited before and did not fuse.
    group = [u for u in group if not u < node and is_plain(u) and _alike(u, node)]
    chosen = group[:1]
    for other in group[1:]:  # the largest set that one op can serve, taken greedily
        if can_stack(state, [*chosen, other], node, other, at_first=True):
            chosen.append(other)
    if len(chosen) < 2:
        return False
    stack(state, chosen, node)
    return True


def _reads_the_same(a: fx.Node, b: fx.Node) -> bool:
    """Whether both ops read the same x with the same routing."""
    names = ("x", "offsets", "ids", "zero_rest")
    return all(argument(a, name) is argument(b, name) for name in names)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether both have the same output dtype, and both or neither have a bias."""
    left, right = example(a), example(b)
    if left is None or right is None or left.dtype != right.dtype:
        return False
    return (argument(a, "bias") is None) == (argument(b, "bias") is None)


@dataclass(frozen=True)
class Rule:
    """A fusion rule, drawn in its function's docstring; the function returns True if it fused.

    `keeps_backward`: the rule also applies if x may need a gradient, which still flows through op.
    """

    name: str
    apply: Callable[[GraphState, fx.Node], bool]
    keeps_backward: bool = False


RULES = (
    Rule("views", _views, keeps_backward=True),
    Rule("bias", _bias, keeps_backward=True),
    Rule("expert_bias", expert_bias, keeps_backward=True),
    Rule("activation", _activation),
    Rule("gated", _gated),
    Rule("halves", _halves),
    Rule("residual", _residual),
    Rule("siblings", _siblings, keeps_backward=True),
    Rule("attention", fuse_attention, keeps_backward=True),  # it refuses, and says so
)
