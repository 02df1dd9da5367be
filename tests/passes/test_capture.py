"""capture: which inputs are constant weights, their names, and that Dynamo's graph stays whole."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqcompile.config import FineQuantConfig
from fqcompile.passes.capture import capture
from tests.passes.graphs import dynamo_graph, run_passes, weight

GLOBAL = weight(64, 64)
X = torch.randn(4, 64)


class Holder(nn.Module):
    """A weight of every kind that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("table", weight(64, 64, 1))
        self.attribute = weight(64, 64, 2)
        self.listed = [weight(64, 64, 3)]
        self.nested = nn.Sequential(nn.Linear(64, 64, bias=False))

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        y = self.nested(self.layer(x)) @ self.table @ self.attribute
        return y @ self.listed[0] @ GLOBAL @ own


def constants(run: object) -> set[str]:
    return {run.state.names[node] for node in run.state.constants}


def test_everything_a_module_holds_is_constant_and_named() -> None:
    run = run_passes(Holder(), X, weight(64, 64, 4), until="capture")
    assert constants(run) == {
        "layer.weight",
        "layer.bias",
        "nested.0.weight",
        "table",
        "attribute",
        "listed.0",
        "GLOBAL",
    }


def test_closure_cells_are_constant_and_arguments_are_not() -> None:
    inner = weight(64, 64)
    run = run_passes(lambda x, y: x @ inner @ y, X, weight(64, 64, 1), until="capture")
    assert constants(run) == {"inner"}
    inputs = [n for n in run.state.graph.nodes if n.op == "placeholder"]
    assert len(inputs) - len(run.state.constants) == 2


def test_weight_that_the_graph_writes_is_not_constant() -> None:
    a, b, c, d = (weight(64, 64, i) for i in range(4))

    def forward(x: Tensor) -> Tensor:
        a.add_(1)
        b.t()[0].mul_(2)
        torch.add(x @ d, 1, out=c[:4])
        return x @ a + x @ b + x @ d

    assert constants(run_passes(forward, X, until="capture")) == {"d"}


def test_weight_that_an_unknown_operator_reads_is_not_constant() -> None:
    """It may write to what it is given."""
    w, v = weight(64, 64), weight(64, 64, 1)
    graph = dynamo_graph(lambda x: x @ w @ v, X)
    graph.module.graph.find_nodes(op="call_function", target=operator.matmul)[0].target = _unknown
    state = capture(graph.module, graph.args, FineQuantConfig())
    assert {state.names[node] for node in state.constants} == {"v"}


def _unknown(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.mul_(2)


def test_what_the_caller_passes_in_is_never_constant() -> None:
    """Nor with Dynamo's mark of a module's own, which stays with a tensor wherever it goes."""
    holder = Holder().requires_grad_(False)
    run_passes(holder, X, weight(64, 64))
    table, parameter = holder.table, holder.layer.weight

    def forward(x: Tensor, t: Tensor, p: Tensor, several: Any) -> Tensor:
        y = x @ t @ p @ several[0] @ several[1]["deep"][0]
        return y @ several[1]["module"].weight

    marked = [table.clone() for _ in range(2)]
    for tensor in marked:
        torch._dynamo.mark_static_address(tensor, guard=False)
    module = nn.Linear(64, 64, bias=False)
    several = [marked[0], {"deep": (marked[1],), "module": module}]
    captured = dynamo_graph(forward, X, table, parameter, several)
    state = capture(captured.module, captured.args, FineQuantConfig())
    assert [state.args[i] is module.weight for i in state.constants.values()] == [True]


def test_parameter_passed_in_is_listed_with_the_reason() -> None:
    run = run_passes(lambda x, w: F.linear(x, w), X, nn.Parameter(weight(64, 64)), until="match")
    assert [(kept.name, kept.reason.partition(":")[0]) for kept in run.state.kept] == [
        ("w", "an argument of the compiled function")
    ]


def test_output_of_a_matmul_written_in_place_leaves_the_weight_constant() -> None:
    w = weight(64, 64)
    assert constants(run_passes(lambda x: (x @ w).add_(1), X, until="capture")) == {"w"}


def test_dynamos_graph_is_never_touched() -> None:
    module = Holder().requires_grad_(False)
    captured = dynamo_graph(module, X, weight(64, 64))

    def snapshot() -> list[tuple[object, ...]]:
        nodes = captured.module.graph.nodes
        return [(n, n.op, n.target, n.args, n.kwargs, list(n.users), sorted(n.meta)) for n in nodes]

    before = snapshot()
    run = run_passes(module, X, weight(64, 64))
    assert run.counts["rewrite"] == 6
    state = capture(captured.module, captured.args, FineQuantConfig())
    for node in list(state.graph.nodes):
        node.meta.clear()
    state.graph.erase_node(next(iter(reversed(state.graph.nodes))))
    assert snapshot() == before


def test_whole_pipeline_leaves_dynamos_graph_as_it_was() -> None:
    run = run_passes(Holder().requires_grad_(False), X, weight(64, 64))
    original = run.captured.module.graph
    assert not any("fqcompile" in str(n.target) or "fq_" in n.name for n in original.nodes)
    assert run.state.graph is not original
    original.lint()


def test_copy_keeps_what_aot_reads_and_drops_the_example_weights() -> None:
    run = run_passes(Holder(), X, weight(64, 64), until="capture")
    ours = [n for n in run.state.graph.nodes if n.op == "placeholder"]
    theirs = [n for n in run.captured.module.graph.nodes if n.op == "placeholder"]
    for own, original in zip(ours, theirs, strict=True):
        assert own._dynamo_source is original._dynamo_source
        assert own.meta["example_value"] is original.meta["example_value"]
        assert "grapharg" not in own.meta


def test_equal_short_names_are_told_apart_by_their_root() -> None:
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    run = run_passes(lambda x: a(x) + b(x), X, until="capture")
    assert constants(run) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_gradients_are_possible_where_the_mode_or_the_graph_says_so() -> None:
    layer = nn.Linear(64, 64)

    def enables(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return layer(x)

    def disables(x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.relu(x)

    assert run_passes(layer, X, until="capture", grad=True).state.grad_possible
    assert run_passes(enables, X, until="capture").state.grad_possible
    assert not run_passes(layer, X, until="capture").state.grad_possible
    assert not run_passes(disables, X, until="capture").state.grad_possible


def test_weight_that_shares_memory_with_a_written_buffer_is_not_constant() -> None:
    base = weight(64, 64)
    view, other = base.view(64, 64), weight(64, 64, 1)

    def forward(x: Tensor) -> Tensor:
        view.mul_(1.5)
        return F.linear(x, base) @ other

    run = run_passes(forward, X, until="match")
    assert constants(run) == {"other"}
    kept = {site.name: site.reason for site in run.state.kept}
    assert kept == dict.fromkeys(("base", "view"), "'mul_' in the graph may write to it")


def test_weight_written_through_a_view_of_an_activations_shape_is_not_constant() -> None:
    w = weight(64, 64)

    def forward(x: Tensor) -> Tensor:
        w.view_as(x).add_(1)
        return x @ w

    assert constants(run_passes(forward, torch.randn(64, 64), until="capture")) == set()


def test_weight_added_in_place_to_an_activation_stays_constant() -> None:
    w = weight(64, 64)

    def forward(x: Tensor) -> Tensor:
        y = x @ w
        y += w[:4]
        return y

    assert constants(run_passes(forward, X, until="capture")) == {"w"}


def test_embedding_that_renormalizes_its_table_writes_to_it() -> None:
    table = weight(64, 64)

    def forward(i: Tensor) -> Tensor:
        return F.linear(F.embedding(i, table, max_norm=1.0), table)

    assert constants(run_passes(forward, torch.arange(4), until="capture")) == set()
