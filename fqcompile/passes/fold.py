"""Read constant expressions of a graph as recipes, and insert new calls before a node.

A new call gets an example value; an equal call that exists already is reused.
"""

import operator
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fqcompile.passes.effects import effects_between, has_effects
from fqcompile.passes.state import GraphState, example, same_layout, same_shape
from fqcompile.torch_compat import memory_id, tree_map_only
from fqcompile.weights.recipe import FOLDABLE, Ref, Step, WeightRecipe, target_name

VIEWS = frozenset(
    "view reshape squeeze unsqueeze flatten unflatten transpose permute expand t mT".split()
)
Size = int | fx.Node


class ConstantFolder:
    """Reads weight-only subexpressions of a graph as recipes over its constant inputs."""

    def __init__(self, state: GraphState) -> None:
        self._constants = state.constants
        self._written = state.written
        self._folds: dict[fx.Node, bool] = {}

    def is_constant(self, node: object) -> bool:
        """Whether the node's value depends on constant inputs alone, through foldable calls."""
        if not isinstance(node, fx.Node):
            return False
        if node not in self._folds:
            self._folds[node] = node in self._constants or (
                node.op in ("call_function", "call_method")
                and target_name(node.target) in FOLDABLE
                and bool(node.all_input_nodes)
                and node not in self._written
                and not has_effects(node)
                and all(self.is_constant(arg) for arg in node.all_input_nodes)
            )
        return self._folds[node]

    def recipe(self, node: fx.Node) -> tuple[WeightRecipe, tuple[fx.Node, ...]]:
        """The steps that compute a constant node, and the constant inputs they start from."""
        nodes = self._ancestors(node)
        sources = [n for n in nodes if n in self._constants]
        steps = [n for n in nodes if n not in self._constants]
        refs = {n: Ref(i) for i, n in enumerate([*sources, *steps])}
        folded = []
        for step in steps:
            args, kwargs = tree_map_only(fx.Node, refs.__getitem__, (step.args, step.kwargs))
            folded.append(Step(step.target, tuple(args), dict(kwargs)))
        return WeightRecipe(len(sources), tuple(folded)), tuple(sources)

    def _ancestors(self, node: fx.Node) -> list[fx.Node]:
        """The node and all it is computed from, inputs before users."""
        seen: dict[fx.Node, None] = {}

        def visit(current: fx.Node) -> None:
            if current not in seen:
                for arg in current.all_input_nodes:
                    visit(arg)
                seen[current] = None

        visit(node)
        return list(seen)


class Emitter:
    """Inserts calls into a graph before a node (`at`), and remembers those that it inserted."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._before: fx.Node = next(iter(graph.nodes))
        self.made: dict[fx.Node, None] = {}  # in order of insertion

    def at(self, before: fx.Node) -> "Emitter":
        """Insert all further calls before this node."""
        self._before = before
        return self

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of a function, or of a tensor method given by its name.

        A view that equals the value it was viewed from returns that value. An equal call that was
        inserted earlier is returned, unless a node with effects lies between.
        """
        method = isinstance(target, str)
        fakes, named = tree_map_only(fx.Node, lambda n: n.meta["example_value"], (args, kwargs))
        value = getattr(fakes[0], target)(*fakes[1:]) if method else target(*fakes, **named)
        known = _same_view_before(args[0], value) if target in VIEWS else None
        known = known or self._made_earlier(target, args, kwargs)
        if known is not None:
            return known
        with self.graph.inserting_before(self._before):
            call = self.graph.call_method if method else self.graph.call_function
            node = call(target, args, kwargs)
        node.meta["example_value"] = value
        self.made[node] = None
        return node

    def _made_earlier(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node | None:
        sources = [arg for arg in args if isinstance(arg, fx.Node)]
        for user in sources[0].users if sources else self.made:
            equal = user.target == target and user.args == args and user.kwargs == kwargs
            if user in self.made and equal and user < self._before:
                return None if effects_between(user, self._before) else user
        return None

    def inline(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Insert the calls that `function` makes of these nodes; its result, with nodes as tensors.

        It may ask tensors for what does not depend on sizes, such as their dtype.
        """
        recorder = _Recorder(self)
        with recorder:
            result = function(*recorder.values(args), **recorder.values(kwargs))
        return recorder.nodes(result)

    def cast(self, value: fx.Node, like: Tensor) -> fx.Node:
        """The value in the dtype of a tensor."""
        cast = value.meta["example_value"].dtype != like.dtype
        return self("to", value, like.dtype) if cast else value

    def laid_out(self, value: fx.Node, like: Tensor) -> fx.Node:
        """The value with the strides of a tensor, so that views of it stay possible as in eager."""
        layout = None if same_layout(value.meta["example_value"], like) else _layout(like)
        if layout is not None:
            value = self("contiguous", self("permute", value, layout))
            value = self("permute", value, tuple(map(layout.index, range(len(layout)))))
        return value

    def size(self, value: fx.Node, dim: int) -> Size:
        """The size of a dimension: a number, or a node that reads it if it is symbolic."""
        found = value.meta["example_value"].shape[dim]
        return self("size", value, dim) if isinstance(found, torch.SymInt) else int(found)

    def product(self, sizes: Sequence[Size]) -> Size:
        """The product of these sizes: a number if all of them are numbers, else a node."""
        total: Size = 1
        for one in sizes:
            numbers = isinstance(total, int) and isinstance(one, int)
            total = total * one if numbers else self(operator.mul, total, one)  # type: ignore[operator]
        return total


class _Recorder(TorchFunctionMode):
    """Inserts each call of PyTorch that is made under it, on example values."""

    def __init__(self, emit: Emitter) -> None:
        super().__init__()
        self._emit = emit
        self._nodes: dict[int, fx.Node] = {}  # of a value, which lives as long as its node

    def values(self, nodes: Any) -> Any:
        """The example values instead of nodes."""
        return tree_map_only(fx.Node, self._value, nodes)

    def nodes(self, values: Any) -> Any:
        """The nodes instead of values."""
        return tree_map_only(Tensor, lambda value: self._nodes[id(value)], values)

    def _value(self, node: fx.Node) -> Any:
        value = node.meta["example_value"]
        self._nodes[id(value)] = node
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name in ("__get__", "dim"):  # of `dtype`, `is_nested`
            return func(*args, **(kwargs or {}))
        target = name if getattr(Tensor, name, None) is func else func
        node = self._emit(target, *self.nodes(args), **self.nodes(kwargs or {}))
        value = node.meta["example_value"]
        if isinstance(value, Tensor):
            return self._value(node)
        return [self._value(self._emit(operator.getitem, node, at)) for at in range(len(value))]


def _layout(value: Tensor) -> tuple[int, ...] | None:
    """The dimensions from outermost to innermost in memory; None if there are gaps."""
    for dims in permutations(range(value.dim())):
        moved = value.permute(dims)
        if same_layout(moved, moved.new_empty(moved.shape)):
            return dims
    return None


def _same_view_before(node: fx.Node, value: Tensor) -> fx.Node | None:
    """Of the values that `node` is a view of, the one that is the same view as `value`, if any."""
    while True:
        fake = example(node)
        if fake is not None and _is_same_view(fake, value):
            return node
        source = node.args[0] if node.args else None
        if target_name(node.target) not in VIEWS or not isinstance(source, fx.Node):
            return None
        node = source


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    places = [(*t.shape, *t.stride(), t.storage_offset()) for t in (a, b)]
    return a.dtype == b.dtype and same_shape(*places) and memory_id(a) == memory_id(b)
