"""Constant folding: find nodes that depend on constant inputs only, and record their recipes."""

from collections.abc import Callable
from typing import Any

from torch import fx

from fqcompile.passes.effects import has_effects
from fqcompile.passes.state import GraphState
from fqcompile.torch_compat import tree_map_only
from fqcompile.weights.recipe import FOLDABLE, Ref, Step, WeightRecipe, target_name


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
            folded.append(Step(_callable(step), tuple(args), dict(kwargs)))
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


def _callable(node: fx.Node) -> str | Callable[..., Any]:
    return node.target
