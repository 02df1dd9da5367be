"""What the passes share: the graph being rewritten, the sites found in it, small graph facts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.config import FineQuantConfig
from fqcompile.kernels.spec import GemmSpec
from fqcompile.passes.effects import has_effects
from fqcompile.passes.naming import InputName, name_inputs
from fqcompile.passes.sites import KeptWeight, WeightSite
from fqcompile.quant.choose import QuantPlan
from fqcompile.torch_compat import copy_sources, is_erased
from fqcompile.weights.node_weight import NodeWeight, Part


@dataclass(frozen=True)
class PackedPair:
    """The two placeholders of one packed weight, and what fills them."""

    qweight: fx.Node
    scale: fx.Node
    spec: NodeWeight


@dataclass
class GraphState:
    """One graph on its way through the pipeline; `module` is a private copy, `args` are real.

    Attributes:
        constants: the constant inputs, with their positions among `args`.
        named: these, and inputs that would be constant if not written, and parameters passed in.
        written: nodes whose memory the named call of the graph may write to.
        gemms: what the kernels were told of each quantised matmul.
        known: what those of `named` are called, and tensors that are attributes of the graph.
        names: their names alone.
        changing: positions among `args` of weights that are others in every call.
        name: the graph's, for messages.
    """

    module: fx.GraphModule
    args: Sequence[Any]
    config: FineQuantConfig
    constants: dict[fx.Node, int]
    named: dict[fx.Node, int]
    written: dict[fx.Node, str]
    known: dict[fx.Node, InputName]
    grad_possible: bool
    names: dict[fx.Node, str] = field(init=False)
    sites: list[WeightSite] = field(default_factory=list)
    kept: list[KeptWeight] = field(default_factory=list)
    packed: dict[fx.Node, PackedPair] = field(default_factory=dict)
    gemms: dict[fx.Node, GemmSpec] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changing: frozenset[int] = frozenset()
    name: str = "the graph"

    def __post_init__(self) -> None:
        self.names = {node: known.name for node, known in self.known.items()}

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def known_in(self, args: Sequence[Any]) -> dict[fx.Node, InputName]:
        """What `known` is where another instance runs the graph, whose weights are in `args`."""
        return self.known | name_inputs(self.named, args)

    def replace_op(self, ops: Sequence[fx.Node], fused: fx.Node, pair: PackedPair) -> None:
        """Record that `fused` now computes what `ops` computed, from `pair`."""
        self.packed[fused] = pair
        for site in self.sites:
            if site.op in ops:
                site.op = fused


def part_of(state: GraphState, site: WeightSite, plan: QuantPlan) -> Part:
    """The site's rows as quantised by this plan, whoever's weights come in."""
    *experts, rows, k = site.shape
    inputs = tuple(state.constants[source] for source in site.sources)
    return Part(site.recipe, inputs, plan, rows, k, *experts)


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


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have equal strides; later views may need those they have."""
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(statically_known_true(n == 1) or statically_known_true(s == t) for n, s, t in dims)


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
    copied = fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    copy_sources(module, copied, mapping)
    return copied, mapping


def erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` without users, last first, and then what only they used among them.

    fx's own dead-code elimination would also drop in-place methods whose result nobody reads.
    """
    for node in reversed(nodes):
        if not node.users and not is_erased(node):
            graph.erase_node(node)


def erase_dead(state: GraphState, nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` that nobody reads, and what then nobody reads among their inputs.

    Quantised matmuls stay, whether read or not: each has its packed inputs.
    """
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        call = node.op in ("call_function", "call_method") and node not in state.packed
        if call and not (is_erased(node) or node.users or has_effects(node)):
            waiting += node.all_input_nodes
            state.graph.erase_node(node)
