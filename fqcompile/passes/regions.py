"""Regions: a body that a graph only runs is written into the graph, where its weights are seen.

invoke_subgraph(body, name, x, w)              ->  the body's calls on x, w
tag_activation_checkpoint(body, x, w)          ->  the same, where no backward recomputes anything
wrap_with_set_grad_enabled(False, body, x, w)  ->  the same, where gradients are off already

The first is what torch.compiler.nested_compile_region leaves in a graph. Other higher-order
operators (cond, map, scan, flex_attention) run their bodies any number of times: they stay, and
what they read stays as it is.
"""

from typing import Any

from torch import fx

from fqcompile.passes.effects import bodies, has_effects, memory_of
from fqcompile.weights.recipe import target_name


def inline_regions(module: fx.GraphModule, *, training: bool) -> None:
    """Write the bodies into the graph, in place, and those inside them."""
    waiting = list(module.graph.nodes)
    while waiting:
        node = waiting.pop()
        operands = _operands(node, training)
        if operands is not None and _takes_single_results(node):
            waiting += _inline(node, operands)


def _operands(node: fx.Node, training: bool) -> tuple[Any, ...] | None:
    """What the one body is given, where the node does no more than run it."""
    name, inner = target_name(node.target), list(bodies(node).values())
    if len(inner) != 1:
        return None
    # Several calls share this body, and with it what Dynamo noted of memory in the first of them.
    if name == "invoke_subgraph" and not any(map(has_effects, inner[0].nodes)):
        return node.args[2:]
    if name == "tag_activation_checkpoint" and not training:
        return node.args[1:]
    if name == "wrap_with_set_grad_enabled" and not (training or node.args[0]):
        return node.args[2:]
    return None


def _takes_single_results(node: fx.Node) -> bool:
    """Whether each user is `result[i]`, a tensor of its own memory."""
    (body,) = bodies(node).values()
    results = _results(body)
    inputs = {memory_of(n.meta.get("example_value")) for n in body.nodes if n.op == "placeholder"}
    memory = [memory_of(r.meta.get("example_value")) for r in results if isinstance(r, fx.Node)]
    if len(memory) < len(results) or not inputs.isdisjoint(memory):
        return False
    return all(target_name(user.target) == "getitem" for user in node.users)


def _results(body: fx.Graph) -> tuple[Any, ...]:
    results = body.output_node().args[0]
    return tuple(results) if isinstance(results, tuple | list) else (None,)


def _inline(node: fx.Node, operands: tuple[Any, ...]) -> list[fx.Node]:
    """The body's calls in place of the node; returns them."""
    ((owner, body),) = bodies(node).items()
    inputs = [n for n in body.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    graph = node.graph
    with graph.inserting_before(node):
        graph.graph_copy(body, mapping)
    made = [new for old, new in mapping.items() if old.op != "placeholder"]
    for new in made:
        if new.op == "get_attr":
            new.target = f"{owner.target}.{new.target}"
    for user in list(node.users):
        index: Any = user.args[1]
        result = mapping[_results(body)[index]]
        result.meta = dict(user.meta)  # of this call, where others share the body
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)
    if not owner.users:
        graph.erase_node(owner)
    return made
