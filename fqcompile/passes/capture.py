"""1 capture: copy Dynamo's graph; decide which inputs are constant weights; name them.

Parameters, buffers, tensor attributes of modules, globals and closure cells are constant. Arguments
of the caller and tensors that the graph writes to are not. Constant inputs stay graph inputs, so
that the same graph runs for other instances with other weights.

Bodies of these higher-order operators are inlined, so that the passes see their weights:

invoke_subgraph(body, name, x, w)              ->  the body's calls on x, w
tag_activation_checkpoint(body, x, w)          ->  the same, where no backward recomputes anything
wrap_with_set_grad_enabled(False, body, x, w)  ->  the same, where gradients are off already

The first is what torch.compiler.nested_compile_region leaves in a graph. Other higher-order
operators (cond, map, scan, flex_attention) run their bodies any number of times: they are not
inlined, and the weights that they read are skipped.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fqcompile.config import FineQuantConfig
from fqcompile.passes.effects import bodies, has_effects, memory_of, written_inputs
from fqcompile.passes.naming import InputName, begin_token, name_inputs
from fqcompile.passes.state import GraphState, copy_module, example, placeholders
from fqcompile.torch_compat import (
    STATIC_INPUT,
    AttrSource,
    GuardSource,
    set_source,
    source_of,
    sources_of_attributes,
)
from fqcompile.weights.recipe import target_name


def capture(module: fx.GraphModule, args: Sequence[Any], config: FineQuantConfig) -> GraphState:
    """The state that all other passes work on; Dynamo's own module is left untouched."""
    copied, _ = copy_module(module)
    inline_regions(copied, training=torch.is_grad_enabled() or enables_grad(copied.graph))
    inputs = placeholders(copied.graph)
    constants = {
        node: index
        for index, (node, value) in enumerate(zip(inputs, args, strict=True))
        if isinstance(value, Tensor) and is_constant_input(node, value)
    }
    passed = {
        node: index
        for index, (node, value) in enumerate(zip(inputs, args, strict=True))
        if isinstance(value, nn.Parameter) and node not in constants
    }
    named = constants | passed
    known = name_inputs(named, args) | _names_inside(copied)
    # What a model carries over a graph break arrives as an argument, and is its own all the same.
    constants |= {node: index for node, index in passed.items() if known[node].held}
    written = _writers(copied.graph, inputs, args)
    return GraphState(
        module=copied,
        args=args,
        config=config,
        constants={node: i for node, i in constants.items() if node not in written},
        named=named,
        written=written,
        known=known,
        grad_possible=torch.is_grad_enabled() or enables_grad(copied.graph),
        begin_token=begin_token(),
    )


def is_constant_input(node: fx.Node, value: Tensor) -> bool:
    """Whether the input is the module's own, a global or a closure cell, not an argument.

    Tensors that the caller passes, also inside containers, are arguments even if they are some
    module's parameters or buffers (Dynamo's mark of those stays with a tensor wherever it is
    passed). If the argument is a module, its parameters and buffers are its own.
    """
    source = source_of(node)
    if source is None:
        mark = node.meta.get("tensor_dict", {}).get(STATIC_INPUT)
        return isinstance(value, nn.Parameter) or mark == "unguarded"
    local = source.guard_source is GuardSource.LOCAL
    attribute = False
    while getattr(source, "base", None) is not None:
        attribute |= isinstance(source, AttrSource)
        source = source.base
    if not local or not getattr(source, "is_input", False):
        return True
    return attribute and isinstance(value, nn.Parameter)  # of an object that is no module


def _writers(graph: fx.Graph, inputs: Sequence[fx.Node], args: Sequence[Any]) -> dict[fx.Node, str]:
    """Nodes whose memory a call with effects may write to, with that call's name.

    Views share their storage, in Dynamo's fake values and, for inputs that are views of each other,
    in the real tensors.
    """
    memory: dict[fx.Node, object] = {n: memory_of(example(n)) or n for n in graph.nodes}
    writers: dict[object, str] = {}
    for node in graph.nodes:
        if has_effects(node):
            writers |= {memory[arg]: target_name(node.target) for arg in written_inputs(node)}
    real = {node: memory_of(value) for node, value in zip(inputs, args, strict=True)}
    through = {real[node]: writers[memory[node]] for node in inputs if memory[node] in writers}
    through.pop(None, None)
    names = {n: writers.get(memory[n]) or through.get(real.get(n)) for n in graph.nodes}
    return {node: name for node, name in names.items() if name is not None}


def enables_grad(graph: fx.Graph) -> bool:
    """Whether grad mode is on in some part of the graph, whatever it is around it."""
    return any(target_name(n.target) == "_set_grad_enabled" and n.args[0] for n in graph.nodes)


def _names_inside(module: fx.GraphModule) -> dict[fx.Node, InputName]:
    """Names of tensors that are attributes of the graph itself, as after freezing."""
    sources = sources_of_attributes(module)
    nodes = [
        node for node in module.graph.nodes if node.op == "get_attr" and example(node) is not None
    ]
    for node in nodes:
        set_source(node, sources.get(str(node.target)))
    values = [attrgetter(str(node.target))(module) for node in nodes]
    return name_inputs({node: index for index, node in enumerate(nodes)}, values)


def inline_regions(module: fx.GraphModule, *, training: bool) -> None:
    """Inline the bodies of higher-order operators, nested ones too, in place."""
    waiting = list(module.graph.nodes)
    while waiting:
        node = waiting.pop()
        operands = _operands(node, training)
        if operands is not None and _takes_single_results(node):
            waiting += _inline(node, operands)


def _operands(node: fx.Node, training: bool) -> tuple[Any, ...] | None:
    """The operands of the node's only body, if all the node does is to run it; else None."""
    name, inner = target_name(node.target), list(bodies(node).values())
    if len(inner) != 1:
        return None
    # Several calls share this body, whose metadata describes the memory of the first call only.
    if name == "invoke_subgraph" and not any(map(has_effects, inner[0].nodes)):
        return node.args[2:]
    if name == "tag_activation_checkpoint" and not training:
        return node.args[1:]
    if name == "wrap_with_set_grad_enabled" and not (training or node.args[0]):
        return node.args[2:]
    return None


def _takes_single_results(node: fx.Node) -> bool:
    """Whether every user is `result[i]`, a tensor that shares no memory with the inputs."""
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
    """Replace the node by the calls of its body, and return them."""
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
        result.meta = dict(user.meta)  # that of this call: others may share the body
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)
    if not owner.users:
        graph.erase_node(owner)
    return made
