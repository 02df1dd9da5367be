"""State that the passes share: the graph being rewritten, the sites found, helpers for graphs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.config import FineQuantConfig
from fqcompile.kernels.spec import GemmSpec
from fqcompile.passes.effects import has_effects
from fqcompile.passes.naming import InputName, name_inputs
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.choose import QuantPlan
from fqcompile.torch_compat import copy_sources, is_erased
from fqcompile.weights.fingerprint import Fingerprint
from fqcompile.weights.node_weight import NodeWeight, Part
from fqcompile.weights.recipe import WeightRecipe

Step = tuple[str, tuple[Any, ...]]  # a tensor method, and its arguments
Kind = Literal["linear", "experts", "other"]


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """A matmul as the roles of its indices:

    y[batch, rows, free] = Σ x[batch, rows, contracted] * w[batch, free, contracted]

    The dimensions of the tensors have any order; x may lack indices of the batch, along which it is
    repeated. A linear layer has no batch, nor have rows that are sorted by expert (`offsets`).

    Attributes:
        weight: the node that is multiplied with.
        stack: the constant that the weight is, or was picked from; `weight_steps` make of it
            [N, K], or [E, N, K] where there are experts.
        x_dims, out_dims: the indices in the order of the dimensions of x and of the result.
        x_singles: dimensions of x, of size one, that broadcasting made and that are none of these.
        bias: added to the result where the form has one; may be any shape that `add` accepts.
        ids: the expert of each element of the batch.
        offsets: the ends of the experts' rows. Without either, the batch numbers the experts.
        gather: the nodes from stack[ids] to the weight.
        zero_rest: rows that belong to no expert are zeros in y; else whatever was in memory.
    """

    x: fx.Node
    weight: fx.Node
    stack: fx.Node
    weight_steps: tuple[Step, ...]
    x_dims: tuple[str, ...]
    out_dims: tuple[str, ...]
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    contracted: tuple[str, ...]
    free: tuple[str, ...]
    x_singles: tuple[int, ...] = ()
    bias: fx.Node | None = None
    ids: fx.Node | None = None
    offsets: fx.Node | None = None
    gather: tuple[fx.Node, ...] = ()
    zero_rest: bool = False

    @property
    def routing(self) -> fx.Node | None:
        """The routing: which expert each row belongs to."""
        return self.ids or self.offsets

    @property
    def of_experts(self) -> bool:
        """Whether there is a matrix for each expert, rather than one."""
        return bool(self.batch) or self.offsets is not None


@dataclass(eq=False, kw_only=True)
class WeightSite:
    """A matmul with a constant weight.

    Attributes:
        kind: its name in plans; "other" is a stack that does not hold experts (one per head).
        node: the matmul in the captured graph.
        contraction: what it multiplies, and how.
        recipe, sources: how the weight is computed from the graph's constant inputs.
        shape: (N, K) or (E, N, K) of what the recipe computes.
        part: "[0]", "[1]" where several sites read one parameter in different ways; ends the name.
        head: an output head: of a usual name, or one whose weight is an embedding's table too.
        tables: sources whose rows are also read as they are, as by an embedding.
        reason: why the site is skipped; None while it may be quantized.
        settled: the reason depends only on the graph and the options, not on the weights.
        plan: how it is quantized, once decided.
        op: the node that computes the site, kept current from rewrite on.
    """

    kind: Kind
    node: fx.Node
    contraction: Contraction
    recipe: WeightRecipe
    sources: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    name: str = ""
    part: str = ""
    head: bool = False
    tables: tuple[fx.Node, ...] = ()
    reason: str | None = None
    settled: bool = False
    plan: QuantPlan | None = None
    op: fx.Node | None = None

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeptWeight:
    """A constant matrix that no supported matmul reads, with its readers; listed, not quantized.

    `identity` is the `id` of the tensor, which the graph must not keep alive; `input` is its
    position among the inputs, if any; `table` tells whether it is named after the reader of its
    rows.
    """

    identity: int
    input: int | None
    name: str
    table: bool
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str


# For the arguments of a call, what each of these sites' weights is to be quantized with.
Calibrate = Callable[[Sequence[Any], Sequence[WeightSite]], Mapping[WeightSite, Calibration]]


@dataclass
class GraphState:
    """One graph on its way through the pipeline; `module` is a private copy, `args` are real.

    Attributes:
        constants: the constant inputs, with their positions among `args`.
        named: these, and inputs that would be constant if not written, and parameters passed in.
        written: nodes whose memory the named call of the graph may write to.
        gemms: what the kernels were told of each quantized matmul.
        known: what those of `named` are called, and tensors that are attributes of the graph.
        names: their names alone.
        changing: positions among `args` of weights that are others in every call.
        decided_for: the state of the weights whose values the plans are for.
        name: the graph's, for messages.
        calibrate: what sees what weights are multiplied with, for the weights of any instance.
        ranks_here: all ranks of a sharded model are here, at the same pass of the same graph.
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
    packed: dict[fx.Node, NodeWeight] = field(default_factory=dict)
    gemms: dict[fx.Node, GemmSpec] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changing: frozenset[int] = frozenset()
    decided_for: Fingerprint = ((), ())
    name: str = "the graph"
    calibrate: Calibrate | None = None
    ranks_here: bool = False

    def __post_init__(self) -> None:
        self.names = {node: known.name for node, known in self.known.items()}

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def known_in(self, args: Sequence[Any]) -> dict[fx.Node, InputName]:
        """`known` for another instance that runs the graph with its weights in `args`."""
        return self.known | name_inputs(self.named, args)

    def replace_op(self, ops: Sequence[fx.Node], fused: fx.Node, weight: NodeWeight) -> None:
        """Record that `fused` now computes the results of `ops`, from `weight`."""
        self.packed[fused] = weight
        for site in self.sites:
            if site.op in ops:
                site.op = fused


def part_of(state: GraphState, site: WeightSite, plan: QuantPlan) -> Part:
    """The site's rows as quantized by this plan, for the weights of any instance."""
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


class _Constant(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value


def constant(graph: fx.Graph, name: str, value: object) -> fx.Node:
    """A node with a value whose repr is no code; the graph's module holds it under the name."""
    owner = graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    owner.add_submodule(name, _Constant(value))
    return graph.call_function(getattr, (graph.get_attr(name), "value"))


def erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` without users, last first, and then what only they used among them.

    fx's own dead-code elimination would also drop in-place methods whose result nobody reads.
    """
    for node in reversed(nodes):
        if not node.users and not is_erased(node):
            graph.erase_node(node)


def erase_dead(state: GraphState, nodes: Sequence[fx.Node]) -> None:
    """Erase the unused ones among `nodes`, then inputs of theirs that became unused.

    Quantized matmuls stay, whether read or not: each has its packed inputs.
    """
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        call = node.op in ("call_function", "call_method") and node not in state.packed
        if call and not (is_erased(node) or node.users or has_effects(node)):
            waiting += node.all_input_nodes
            state.graph.erase_node(node)
