"""Before capture: what a graph does with sharded weights, written with the parts that lie here.

linear(x, to_local(W))     ->   linear(x, w)                             w: this rank's part of W
linear(X, W, B)            ->   from_local(linear(to_local(X), w, b))    see local_linear
to_local(from_local(x))    ->   x

The parts become inputs after those that Dynamo passes; all passes then see plain tensors. The
collectives stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.distributed.shards import (
    from_local,
    fsdp_refusal,
    is_dtensor,
    local_part,
    note_updates,
    version,
)
from fqcompile.errors import ShardingError
from fqcompile.passes.base import copy_module, erase_unused, example, placeholders
from fqcompile.passes.capture import enables_grad, is_constant_input
from fqcompile.passes.effects import has_effects
from fqcompile.passes.local_linear import LocalLinear, local_linear
from fqcompile.passes.naming import qualified_name
from fqcompile.torch_compat import STATIC_INPUT, AttrSource, set_source, source_of
from fqcompile.weights.recipe import target_name

_CONVERSIONS = ("to_local", "from_local", "redistribute", "getattr")


@dataclass(frozen=True)
class LocalGraph:
    """A graph on local parts: `sharded` are the inputs whose parts it takes after all others."""

    module: fx.GraphModule
    sharded: tuple[int, ...]

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """What the graph takes where Dynamo's takes `args`."""
        note_updates([args[i] for i in self.sharded])
        return [*args, *(local_part(args[i]) for i in self.sharded)]

    def wrap(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A function of Dynamo's arguments from one of this graph's."""
        if not self.sharded:
            return inner
        # itemgetter gives one item bare, and a tuple of several
        pick = itemgetter(*self.sharded, self.sharded[0])
        seen: tuple[object, ...] = ()

        def run(*args: Any) -> Any:
            nonlocal seen
            sharded = pick(args)
            state = (tuple(map(id, sharded)), tuple(map(version, sharded)))
            if state != seen:
                note_updates(sharded)
                seen = state
            return inner(*args, *map(local_part, sharded[:-1]))

        return run


def refuse_fsdp(graph: fx.Graph) -> None:
    """Raise where the graph reads a weight that FSDP gathers.

    Raises:
        ShardingError: there is one.
    """
    for node in placeholders(graph):
        source = source_of(node)
        guarded = getattr(source, "guard_source", None)
        if guarded is not None and guarded.is_fsdp_module():
            raise ShardingError(fsdp_refusal(qualified_name(node)))


def localize(module: fx.GraphModule, args: Sequence[Any]) -> LocalGraph:
    """The graph on the local parts of its constant DTensors; itself where it has none."""
    inputs = list(zip(placeholders(module.graph), args, strict=True))
    if not any(is_dtensor(value) for _, value in inputs):
        return LocalGraph(module, ())
    copied, mapping = copy_module(module)
    trains = torch.is_grad_enabled() or enables_grad(copied.graph)
    sharded = []
    for index, (original, value) in enumerate(inputs):
        node = mapping[original]
        constant = is_dtensor(value) and is_constant_input(node, value)
        if constant and not (trains and value.requires_grad) and _use_local(copied.graph, node):
            sharded.append(index)
    if not trains:
        _straighten(copied.graph)
    erase_unused(copied.graph, [n for n in copied.graph.nodes if _only_converts(n)])
    copied.graph.lint()
    copied.recompile()
    return LocalGraph(copied, tuple(sharded))


def _use_local(graph: fx.Graph, weight: fx.Node) -> bool:
    """Let the users of a sharded weight read its local part where they can; whether any does."""
    if any(has_effects(user) for user in weight.users):
        return False
    linears = {user: form for user in weight.users if (form := local_linear(user, weight))}
    reads = [user for user in weight.users if _is(user, "to_local")]
    if not linears and not reads:
        return False
    part = _part_input(graph, weight)
    for read in reads:
        read.replace_all_uses_with(part)
        graph.erase_node(read)
    for node, form in linears.items():
        _replace_linear(graph, node, form, part)
    return True


def _is(node: fx.Node, name: str) -> bool:
    """Whether it is that call of a DTensor, which torch before 2.13 wraps as `prim_<name>`."""
    return node.op.startswith("call") and target_name(node.target).removeprefix("prim_") == name


def _part_input(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """An input for the weight's local part, behind all others, named as the weight is."""
    with graph.inserting_after(placeholders(graph)[-1]):
        part = graph.placeholder(f"{weight.name}_local")
    set_source(part, AttrSource(source_of(weight), "_local_tensor"))
    static = {STATIC_INPUT: "unguarded"}
    part.meta = {"example_value": _fake_part(weight), "tensor_dict": static}
    return part


def _replace_linear(graph: fx.Graph, node: fx.Node, form: LocalLinear, part: fx.Node) -> None:
    with graph.inserting_before(node):
        x = graph.call_method("to_local", (form.x,), form.grad_of_x)
        x.meta["example_value"] = _fake_part(form.x)
        bias = None
        if form.local_bias:
            bias = graph.call_method("to_local", (form.bias,))
            bias.meta["example_value"] = _fake_part(form.bias)
        product = graph.call_function(torch.nn.functional.linear, (x, part, bias))
        product.meta["example_value"] = _fake_part(node)
        mesh = graph.call_function(getattr, (form.x, "device_mesh"))
        options = {"run_check": False, **form.whole}
        result = graph.call_function(from_local(), (product, mesh, list(form.out)), options)
        result.meta = dict(node.meta)
        if form.bias is not None and not form.local_bias:
            result = graph.call_function(torch.add, (result, form.bias))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _straighten(graph: fx.Graph) -> None:
    """Take the local tensor that a DTensor was made from, where its layout is the same still.

    Not where gradients flow: the way back may have to sum what the way there did not.
    """
    for node in list(graph.nodes):
        if not _is(node, "to_local") or node.kwargs:
            continue
        made = node.args[0]
        while _is(made, "redistribute") and _same_layout(made, made.args[0]):
            made = made.args[0]
        if _is(made, "from_local") and _keeps(made):
            node.replace_all_uses_with(made.args[0])
            graph.erase_node(node)


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    left, right = example(a), example(b)
    if not (is_dtensor(left) and is_dtensor(right)) or left.dtype != right.dtype:
        return False
    return bool(left.placements == right.placements)


def _keeps(made: fx.Node) -> bool:
    """Whether the DTensor holds the tensor that it was made from."""
    whole = example(made)
    return is_dtensor(whole) and "grad_placements" not in made.kwargs


def _fake_part(node: fx.Node | None) -> Tensor:
    value = example(node)
    assert value is not None
    return local_part(value)


def _only_converts(node: fx.Node) -> bool:
    return any(_is(node, name) for name in _CONVERSIONS)
