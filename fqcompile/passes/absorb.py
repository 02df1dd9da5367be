"""How an op takes over what follows it: the node is computed by the op, in the node's place."""

from torch import fx

from fqcompile.passes.base import GraphState, erase_dead, example, same_layout, same_shape
from fqcompile.passes.effects import effects_between
from fqcompile.passes.op_nodes import argument, changed, is_linear, is_quantized
from fqcompile.weights.recipe import target_name


def op_under(value: object, sole: bool = True) -> tuple[fx.Node | None, fx.Node | None]:
    """(op, view) where the value is an op's result, or a reshaping of an op's rows that is its
    only user. `sole`: the value is read once."""
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
    """`fused`, or its rows in the shape of `view`, in place of `node`; then nobody reads those."""
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
