"""1 capture: copy Dynamo's graph; decide which inputs are constant weights; name them.

A parameter, a buffer, a tensor attribute of a module, a global and a closure cell are constant;
what the caller passes in is not, whatever it is, and nothing that the graph itself writes to is.
Constant inputs stay inputs: the same graph runs for other instances with other weights.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fqcompile.config import FineQuantConfig
from fqcompile.passes.base import GraphState, copy_module, example, placeholders
from fqcompile.passes.effects import has_effects, memory_of, written_inputs
from fqcompile.passes.naming import InputName, name_inputs
from fqcompile.passes.regions import inline_regions
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
    )


def is_constant_input(node: fx.Node, value: Tensor) -> bool:
    """Whether the input is the module's own, a global or a closure cell, and not the caller's.

    The caller's are arguments and what lies in containers of them, also where it is a module's
    parameter or buffer: Dynamo's mark of those stays with a tensor wherever it is passed. Parts of
    a module that is an argument are that module's own.
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
    """Of the tensors that are attributes of the graph itself, as freezing makes them."""
    sources = sources_of_attributes(module)
    nodes = [
        node for node in module.graph.nodes if node.op == "get_attr" and example(node) is not None
    ]
    for node in nodes:
        set_source(node, sources.get(str(node.target)))
    values = [attrgetter(str(node.target))(module) for node in nodes]
    return name_inputs({node: index for index, node in enumerate(nodes)}, values)
