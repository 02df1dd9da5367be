"""verify: each rule is seen to fire on a graph broken by hand, and names the pass and the node."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fqcompile.errors import GraphInvariantError
from fqcompile.passes.op_nodes import argument, changed, is_linear
from fqcompile.passes.pipeline import verify
from fqcompile.passes.state import GraphState
from tests.passes.graphs import run_passes, weight

W = weight(64, 64)


def make_state() -> GraphState:
    return run_passes(lambda x: F.elu(F.linear(x, W)), torch.randn(4, 64), until="select").state


def op_of(state: GraphState) -> torch.fx.Node:
    return next(n for n in state.graph.nodes if is_linear(n))


def late_input(state: GraphState) -> None:
    with state.graph.inserting_after(op_of(state)):
        state.graph.placeholder("late")


def forgotten_weight(state: GraphState) -> None:
    state.packed.clear()


def weight_of_no_op(state: GraphState) -> None:
    other = next(n for n in state.graph.nodes if n.op == "output")
    state.packed[other] = state.packed[op_of(state)]


def swapped_inputs(state: GraphState) -> None:
    op = op_of(state)
    codes, scale = argument(op, "qweight"), argument(op, "scale")
    op.target, op.args = changed(op, qweight=scale, scale=codes)


def wrong_rows(state: GraphState) -> None:
    op = op_of(state)
    op.target, op.args = changed(op, n=63)


def gated_alone(state: GraphState) -> None:
    op = op_of(state)
    op.target, op.args = changed(op, gated=True)


def wrong_group(state: GraphState) -> None:
    op = op_of(state)
    op.target, op.args = changed(op, group_size=64)


def wrong_meta(state: GraphState) -> None:
    op_of(state).meta["example_value"] = torch.empty(4, 63)


def missing_meta(state: GraphState) -> None:
    del op_of(state).meta["example_value"]


def erased_op(state: GraphState) -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    graph.erase_node(node)
    state.sites[0].op = node


def plan_and_reason(state: GraphState) -> None:
    state.sites[0].reason = "because"


BREAKS: list[tuple[Callable[[GraphState], None], str]] = [
    (late_input, "inputs come before all calls"),
    (forgotten_weight, "each op has exactly one packed weight"),
    (weight_of_no_op, "each op has exactly one packed weight"),
    (swapped_inputs, "reads two inputs of its own, codes before scales"),
    (wrong_rows, "n and gated say 63 rows, its spec 64"),
    (gated_alone, "n and gated say 128 rows, its spec 64"),
    (wrong_group, "group size as in its spec"),
    (wrong_meta, "result has N columns"),
    (missing_meta, "result has N columns"),
    (erased_op, "a rewritten site names a live op"),
    (plan_and_reason, "a plan or a reason, not both"),
]


@pytest.mark.parametrize(("damage", "rule"), BREAKS, ids=[d.__name__ for d, _ in BREAKS])
def test_broken_graph_is_named(damage: Callable[[GraphState], None], rule: str) -> None:
    state = make_state()
    verify(state, "select")
    damage(state)
    with pytest.raises(GraphInvariantError, match=f"^after fuse: .*{rule}"):
        verify(state, "fuse")


def test_graph_that_fx_refuses_is_refused() -> None:
    state = make_state()
    elu = next(n for n in state.graph.nodes if n.op == "call_function" and not is_linear(n))
    op_of(state).prepend(elu)
    with pytest.raises(RuntimeError):
        verify(state, "fuse")
