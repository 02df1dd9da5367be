"""Before capture: rewrite a graph's operations on sharded weights to use this rank's shards.

linear(x, to_local(W))     ->   linear(x, w)                             w: this rank's part of W
linear(X, W, B)            ->   from_local(linear(to_local(X), w, b))    without communication where
    X replicated,    W by rows       ->   Y by its last dimension     "column-wise"
    X by its last,   W by columns    ->   Y a sum over the ranks      "row-wise": B is added later
    X in any way,    W replicated    ->   Y as X
to_local(from_local(x))    ->   x

The parts become inputs after those that Dynamo passes; all passes then see plain tensors. The
collectives stay as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.distributed.shards import (
    fsdp_refusal,
    is_dtensor,
    local_part,
    note_updates,
    partial_sum,
    version,
)
from fqcompile.errors import ShardingError
from fqcompile.passes.capture import enables_grad, is_constant_input
from fqcompile.passes.effects import has_effects
from fqcompile.passes.naming import qualified_name
from fqcompile.passes.state import constant, copy_module, erase_unused, example, placeholders
from fqcompile.torch_compat import STATIC_INPUT, AttrSource, set_source, source_of
from fqcompile.weights.recipe import target_name

_CONVERSIONS = ("to_local", "from_local", "redistribute", "getattr")


@dataclass(frozen=True)
class LocalLinear:
    """y = linear(x, w, b) on local parts.

    Attributes:
        local_bias: the bias is added to each rank's part of y; else to y, if there is a bias.
        out: the placements of y.
        whole: arguments of `from_local` for the shape and stride of y, if parts do not imply them.
        grad_of_x: the placements of the gradient of x's local part, if they differ from x's.
    """

    x: fx.Node
    bias: fx.Node | None
    local_bias: bool
    out: tuple[Any, ...]
    whole: Mapping[str, Any]
    grad_of_x: tuple[Any, ...] | None


@dataclass(frozen=True)
class LocalGraph:
    """A graph on local parts: `sharded` are the inputs whose parts it takes after all others."""

    module: fx.GraphModule
    sharded: tuple[int, ...]

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of the rewritten graph, for Dynamo's `args`."""
        note_updates([args[i] for i in self.sharded])
        return [*args, *(local_part(args[i]) for i in self.sharded)]

    def wrap(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A function of Dynamo's arguments from one of this graph's."""
        if not self.sharded:
            return inner
        # itemgetter of one position returns the bare item: the first is repeated to get a tuple
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
    """Check that the graph reads no weight that FSDP gathers.

    Raises:
        ShardingError: it reads one.
    """
    for node in placeholders(graph):
        source = source_of(node)
        guarded = getattr(source, "guard_source", None)
        if guarded is not None and guarded.is_fsdp_module():
            raise ShardingError(fsdp_refusal(qualified_name(node)))


def localize(module: fx.GraphModule, args: Sequence[Any]) -> LocalGraph:
    """The graph on the local parts of its constant DTensors; unchanged if it has none."""
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
    """Make users of a sharded weight read its local part if they can; return whether any does."""
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
    """Whether the node is this DTensor call, which torch before 2.13 wraps as `prim_<name>`."""
    return node.op.startswith("call") and target_name(node.target).removeprefix("prim_") == name


def _part_input(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """A new last input for the weight's local part, named after the weight."""
    with graph.inserting_after(placeholders(graph)[-1]):
        part = graph.placeholder(f"{weight.name}_local")
    set_source(part, AttrSource(source_of(weight), "_local_tensor"))
    static = {STATIC_INPUT: "unguarded"}
    part.meta = {"example_value": _fake_part(weight), "tensor_dict": static}
    return part


def _replace_linear(graph: fx.Graph, node: fx.Node, form: LocalLinear, part: fx.Node) -> None:
    with graph.inserting_before(node):
        backward: dict[str, Any] = {}
        if form.grad_of_x:
            backward["grad_placements"] = constant(graph, f"{node.name}_grad", form.grad_of_x)
        x = graph.call_method("to_local", (form.x,), backward)
        x.meta["example_value"] = _fake_part(form.x)
        bias = None
        if form.local_bias:
            bias = graph.call_method("to_local", (form.bias,))
            bias.meta["example_value"] = _fake_part(form.bias)
        product = graph.call_function(torch.nn.functional.linear, (x, part, bias))
        product.meta["example_value"] = _fake_part(node)
        mesh = graph.call_function(getattr, (form.x, "device_mesh"))
        options = {"run_check": False, **form.whole}
        out = constant(graph, f"{node.name}_out", form.out)
        # a static method, but PyTorch 2.11 generates no valid code for it as a function
        result = graph.call_method("from_local", (form.x, product, mesh, out), options)
        result.meta = dict(node.meta)
        if form.bias is not None and not form.local_bias:
            result = graph.call_function(torch.add, (result, form.bias))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _straighten(graph: fx.Graph) -> None:
    """Replace to_local(from_local(x)) by x if the placements are equal.

    Not valid if gradients flow: the backward may have to sum over ranks.
    """
    for node in list(graph.nodes):
        if not _is(node, "to_local") or node.kwargs:
            continue
        made = node.args[0]
        while _is(made, "redistribute") and _same_layout(made, made.args[0]):
            made = made.args[0]
        if _is(made, "from_local") and _keeps(made):
            node.replace_all_uses_with(made.args[made.op == "call_method"])
            graph.erase_node(node)


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    left, right = example(a), example(b)
    if not (is_dtensor(left) and is_dtensor(right)) or left.dtype != right.dtype:
        return False
    return bool(left.placements == right.placements)


def _keeps(made: fx.Node) -> bool:
    """Whether to_local of this DTensor is the tensor that it was made from."""
    whole = example(made)
    return is_dtensor(whole) and "grad_placements" not in made.kwargs


def _fake_part(node: fx.Node | None) -> Tensor:
    value = example(node)
    assert value is not None
    return local_part(value)


def _only_converts(node: fx.Node) -> bool:
    return node.op == "get_attr" or any(_is(node, name) for name in _CONVERSIONS)


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ROWS, _COLUMNS = 0, 1


def local_linear(node: fx.Node, weight: fx.Node) -> LocalLinear | None:
    """The node as a linear whose local parts multiply without communication, or None."""
    call = _arguments(node)
    if call is None or [n for n in call.values() if n is weight] != [call["weight"]]:
        return None
    x, w, y = (example(n) for n in (call["input"], weight, node))
    bias, b = call["bias"], example(call["bias"])
    if not (is_dtensor(x) and is_dtensor(w) and is_dtensor(y)) or x.device_mesh != w.device_mesh:
        return None
    placed = list(zip(x.placements, w.placements, y.placements, strict=True))
    kinds = [_kind(*three, x.dim() - 1) for three in placed]
    whole = _whole(y)
    if None in kinds or whole is None or (bias is not None and not is_dtensor(b)):
        return None
    # If the parts are partial sums, the bias is added once, to the sum.
    local_bias = "sum" not in kinds
    if is_dtensor(b) and local_bias and not all(map(_adds, kinds, x.placements, b.placements)):
        return None
    gradient = tuple(
        partial_sum() if kind == "rows" else own
        for kind, own in zip(kinds, x.placements, strict=True)
    )
    grad_of_x = gradient if "rows" in kinds else None
    return LocalLinear(
        call["input"], bias, bias is not None and local_bias, tuple(y.placements), whole, grad_of_x
    )


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    if node.op != "call_function" or target_name(node.target) != "linear":
        return None
    names = ("input", "weight", "bias")
    call = dict.fromkeys(names) | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return call if isinstance(call["input"], fx.Node) else None


def _kind(x: Any, w: Any, y: Any, last: int) -> str | None:
    """The kind of parallelism along one dimension of the mesh, by its placements."""
    if x.is_replicate() and w.is_shard(_ROWS) and y.is_shard(last):
        return "rows"
    if x.is_shard(last) and w.is_shard(_COLUMNS) and y.is_partial():
        return "sum"
    apart = x.is_shard() and not x.is_shard(last)
    return "same" if w.is_replicate() and x == y and (x.is_replicate() or apart) else None


def _adds(kind: str | None, x: Any, bias: Any) -> bool:
    """Whether each rank's part of the bias belongs to its part of the product."""
    if kind == "rows":
        return bool(bias.is_shard(0))
    return bool(bias.is_replicate() and x.is_replicate())


def _whole(y: "DTensor") -> dict[str, Any] | None:
    """The arguments by which `from_local` knows the whole shape; None if there are none.

    For symbolic sizes it needs none if all parts are equally large: it multiplies their sizes.
    """
    if all(isinstance(size, int) for size in (*y.shape, *y.stride())):
        return {"shape": tuple(y.shape), "stride": tuple(y.stride())}
    parts = [size * _ranks_along(y, dim) for dim, size in enumerate(local_part(y).shape)]
    even = all(map(statically_known_true, map(eq, parts, y.shape)))
    return {} if even else None


def _ranks_along(y: "DTensor", dim: int) -> int:
    sizes = zip(y.placements, y.device_mesh.shape, strict=True)
    return math.prod(size for placed, size in sizes if placed.is_shard(dim))
