"""What the passes share: the graph being rewritten, the sites found in it, small graph facts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.config import FineQuantConfig
from fqcompile.kernels import ops as _ops  # noqa: F401  (defines fqcompile::linear)
from fqcompile.quant.choose import QuantPlan
from fqcompile.weights.packed import PackedSpec
from fqcompile.weights.recipe import WeightRecipe


@dataclass(frozen=True)
class GraphStep:
    """A tensor method that rewriting puts before or after the op: `value.method(*args)`."""

    method: str
    args: tuple[Any, ...] = ()


@dataclass(eq=False)
class LinearSite:
    """One matmul with a constant weight, in the form y = x @ wᵀ + bias with w [N, K].

    Attributes:
        node: the matmul in the captured graph.
        x: the activation; `x_steps` bring it to [..., K], `out_steps` the result to node's shape.
        bias: added to the result where the form has one; may be any shape that `add` accepts.
        weight: the node that is multiplied with.
        recipe, sources: how it comes from the graph's constant inputs.
        reason: why the site stays as it is; None while it may be quantised.
        settled: the reason lies in the graph and the options, and holds whatever the weights are.
        plan, packed: set by choose and by quantize.
        op: the node that computes the site, kept current from rewrite on.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    recipe: WeightRecipe
    sources: tuple[fx.Node, ...]
    shape: tuple[int, int]
    bias: fx.Node | None = None
    x_steps: tuple[GraphStep, ...] = ()
    out_steps: tuple[GraphStep, ...] = ()
    name: str = ""
    head: bool = False
    reason: str | None = None
    settled: bool = False
    plan: QuantPlan | None = None
    packed: PackedSpec | None = None
    op: fx.Node | None = None


@dataclass(frozen=True)
class KeptWeight:
    """A constant matrix that no linear form reads, with what reads it; listed, never quantised."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str


@dataclass(frozen=True)
class PackedPair:
    """The two placeholders of one packed weight, and what fills them."""

    qweight: fx.Node
    scale: fx.Node
    spec: PackedSpec


@dataclass
class GraphState:
    """One graph on its way through the pipeline; `module` is a private copy, `args` are real.

    Attributes:
        constants: the constant inputs, with their positions among `args`.
        written: nodes whose memory the named call of the graph may write to.
        names: parameter names of the inputs that are constant, or would be if not written.
    """

    module: fx.GraphModule
    args: Sequence[Any]
    config: FineQuantConfig
    constants: dict[fx.Node, int]
    written: dict[fx.Node, str]
    names: dict[fx.Node, str]
    grad_possible: bool
    sites: list[LinearSite] = field(default_factory=list)
    kept: list[KeptWeight] = field(default_factory=list)
    packed: dict[fx.Node, PackedPair] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def replace_op(self, ops: Sequence[fx.Node], fused: fx.Node, pair: PackedPair) -> None:
        """Record that `fused` now computes what `ops` computed, from `pair`."""
        self.packed[fused] = pair
        for site in self.sites:
            if site.op in ops:
                site.op = fused


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def example(node: object) -> Tensor | None:
    """The fake value that Dynamo recorded for a node, or None for anything but a tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal; asking adds no guard on symbolic sizes."""
    return len(a) == len(b) and all(
        statically_known_true(left == right) for left, right in zip(a, b, strict=True)
    )


def copy_module(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A GraphModule on a copy of the graph, with what Dynamo and AOTAutograd read from it.

    Editing Dynamo's own graph object changes the calling convention that its guards were built for.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, mapping))
    for old, new in mapping.items():
        # "grapharg" would keep the example weights alive for as long as the copy
        new.meta = {key: value for key, value in old.meta.items() if key != "grapharg"}
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    if hasattr(module, "_param_name_to_source"):
        copied._param_name_to_source = module._param_name_to_source
    return copied, mapping


def erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` without users, last first, and then what only they used among them.

    fx's own dead-code elimination would also drop in-place methods whose result nobody reads.
    """
    for node in reversed(nodes):
        if not node.users and not node._erased:
            graph.erase_node(node)


LINEAR = torch.ops.fqcompile.linear.default
LINEAR_INFERENCE = torch.ops.fqcompile.linear.inference
_ARGUMENTS = tuple(argument.name for argument in LINEAR._schema.arguments)


def is_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in (LINEAR, LINEAR_INFERENCE)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an fqcompile::linear node by its schema name; all are positional."""
    return node.args[_ARGUMENTS.index(name)]


def replaced_arguments(node: fx.Node, **changes: Any) -> tuple[Any, ...]:
    """The arguments of an fqcompile::linear node with some changed."""
    return tuple(
        changes.get(name, value) for name, value in zip(_ARGUMENTS, node.args, strict=True)
    )
