"""6 rewrite: each quantised matmul becomes one call of an operator on two new inputs.

linear(x, w, b)  ->  fqcompile.linear(x, qweight_i, scale_i, b, ...)        x [..., K] -> [..., N]
addmm(b, x, w)   ->  the same; other forms put views around it, and a bias that is no row last
experts          ->  fqcompile.grouped_linear or gathered_linear, see `expert_rewrite`
"""

import torch
from torch import fx

from fqcompile.passes.base import (
    GraphState,
    PackedPair,
    erase_dead,
    erase_unused,
    example,
    placeholders,
)
from fqcompile.passes.emit import Emitter
from fqcompile.passes.expert_rewrite import emit_experts, views_of_result
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.op_nodes import LINEAR
from fqcompile.passes.sites import ExpertSite, GraphStep, LinearSite
from fqcompile.weights.packed import PackedSpec


def rewrite(state: GraphState) -> int:
    """Replace every site that quantize packed; returns how many."""
    chosen = [(site, site.packed) for site in state.sites if site.packed is not None]
    folder = ConstantFolder(state)
    folded = [n for n in state.graph.nodes if n.op != "placeholder" and folder.is_constant(n)]
    emit = Emitter(state.graph)
    replaced: dict[fx.Node, fx.Node] = {}
    for index, (site, spec) in enumerate(chosen):
        pair = _add_inputs(state, spec, f"fq_{index}")
        state.matched.append(f"{site.name}: {site.node.format_node()}")
        if isinstance(site, ExpertSite):
            _replace_experts(state, site, pair, replaced, emit.at(site.node))
        else:
            assert isinstance(site, LinearSite)
            replaced[site.node] = _replace(state, site, pair, replaced)
        state.matched[-1] = f"{site.name}: {site.node.name} -> {site.op}"
    erase_unused(state.graph, folded)
    erase_dead(state, [*replaced, *replaced.values(), *emit.made])
    return len(chosen)


def _replace_experts(
    state: GraphState,
    site: ExpertSite,
    pair: PackedPair,
    replaced: dict[fx.Node, fx.Node],
    emit: Emitter,
) -> None:
    """Also without the gather of dense weights, and without views that undo each other."""
    node = site.node
    bias = site.bias and replaced.get(site.bias, site.bias)
    op, rows, y = emit_experts(emit, site, replaced.get(site.x, site.x), bias, pair)
    state.packed[op] = pair
    site.op = op
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    replaced[node] = y
    for view in views_of_result(rows, y):  # they, and the gather, are erased in the end
        view.replace_all_uses_with(rows)
        replaced[view] = rows


def _add_inputs(state: GraphState, spec: PackedSpec, prefix: str) -> PackedPair:
    """New placeholders after the last one; `lower` gives them their tensors and metadata."""
    nodes = []
    for name in ("qweight", "scale"):
        with state.graph.inserting_after(placeholders(state.graph)[-1]):
            nodes.append(state.graph.placeholder(f"{prefix}_{name}"))
    return PackedPair(nodes[0], nodes[1], spec)


def _replace(
    state: GraphState, site: LinearSite, pair: PackedPair, replaced: dict[fx.Node, fx.Node]
) -> fx.Node:
    """The node that stands for the site's matmul now; `replaced` knows those of earlier sites."""
    graph, node = state.graph, site.node
    bias = site.bias and replaced.get(site.bias, site.bias)
    row_bias = bias if _is_row(site) else None
    with graph.inserting_before(node):
        x = _apply(graph, replaced.get(site.x, site.x), site.x_steps)
        op = _linear(graph, x, pair, row_bias, site)
        y = _apply(graph, op, site.out_steps)
        if bias is not None and row_bias is None:
            dtype = node.meta["example_value"].dtype
            if bias.meta["example_value"].dtype != dtype:  # autocast casts addmm's bias, not add's
                bias = _apply(graph, bias, (GraphStep("to", (dtype,)),))
            y = graph.call_function(torch.add, (y, bias))
    y.meta = dict(node.meta)
    state.packed[op] = pair
    site.op = op
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return y


def _linear(
    graph: fx.Graph, x: fx.Node, pair: PackedPair, bias: fx.Node | None, site: LinearSite
) -> fx.Node:
    (n, k), spec = site.shape, pair.spec
    weight = (pair.qweight, pair.scale)
    formats = (spec.bits, spec.group_size, n, k)
    op = graph.call_function(LINEAR, (x, *weight, bias, None, *formats, "none", False, ""))
    fake_x, fake_out = example(x), example(site.node)
    assert fake_x is not None and fake_out is not None
    shape = (*fake_x.shape[:-1], n)
    op.meta["example_value"] = fake_x.new_empty(shape, dtype=fake_out.dtype)
    return op


def _is_row(site: LinearSite) -> bool:
    """Whether the bias is one value per output column, which the op itself adds."""
    bias = example(site.bias)
    return bias is not None and tuple(bias.shape) == site.shape[:1] and not site.out_steps


def _apply(graph: fx.Graph, value: fx.Node, steps: tuple[GraphStep, ...]) -> fx.Node:
    for step in steps:
        fake = example(value)
        assert fake is not None
        value = graph.call_method(step.method, (value, *step.args))
        value.meta["example_value"] = getattr(fake, step.method)(*step.args)
    return value
