"""The state that passes share: the graph being rewritten, its sites, and helpers for graphs."""

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

    The dimensions of the tensors may have any order. x may lack batch indices, along which it is
    then repeated. Neither a linear layer nor rows sorted by expert (`offsets`) have a batch.

    Attributes:
        weight: the node of the weight operand.
        stack: the constant that the weight is, or was picked from; `weight_steps` turn it into
            [N, K], or [E, N, K] for experts.
        x_dims, out_dims: the indices of the dimensions of x and of the result, in order.
        x_singles: dimensions of x of size one that exist only for broadcasting; not in x_dims.
        bias: added to the result, if given; any shape that `add` accepts.
        of_layer: a linear layer or a convolution, whose bias [N] has a value for each output.
        ids: the expert of each element of the batch.
        offsets: the end of each expert's rows. Without ids and offsets, the batch is the experts.
        gather: the nodes from stack[ids] to the weight.
        zero_rest: rows of y that belong to no expert are zeros; else they are not initialized.
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
    of_layer: bool = False
    ids: fx.Node | None = None
    offsets: fx.Node | None = None
    gather: tuple[fx.Node, ...] = ()
    zero_rest: bool = False

    @property
    def routing(self) -> fx.Node | None:
        """The ids or offsets that tell which expert each row belongs to; None without routing."""
        return self.ids or self.offsets

    @property
    def of_experts(self) -> bool:
        """Whether there is a matrix for each expert, rather than one."""
        return bool(self.batch) or self.offsets is not None


@dataclass(eq=False, kw_only=True)
class WeightSite:
    """A matmul with a constant weight.

    Attributes:
        kind: the kind in plans; "other" is a stack of something else than experts, such as heads.
        node: the matmul in the captured graph.
        contraction: what it multiplies, and how.
        recipe, sources: how the weight is computed from the graph's constant inputs.
        shape: (N, K) or (E, N, K) of what the recipe computes.
        part: "[0]" or "[1]", the end of the name, if sites read different parts of one parameter.
        head: an output head, by its name or because its weight is also an embedding's table.
        tables: sources whose rows are also read directly, as by an embedding.
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

    `identity` is the `id` of the tensor, which the graph must not keep alive. `input` is its
    position among the inputs, if any. `table`: it is named after the module that reads its rows.
    """

    identity: int
    input: int | None
    name: str
    table: bool
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str


# (arguments of a call, sites) -> the calibration of each site's weight.
Calibrate = Callable[[Sequence[Any], Sequence[WeightSite]], Mapping[WeightSite, Calibration]]


@dataclass
class GraphState:
    """One graph on its way through the pipeline; `module` is a private copy, `args` are real.

    Attributes:
        constants: the constant inputs, with their positions among `args`.
        named: `constants`, parameters passed in, and inputs that are not constant only because the
            graph writes to them.
        written: nodes whose memory the named call of the graph may write to.
        gemms: the GemmSpec of each quantized matmul.
        begin_token: what sequences of token ids begin with in the model that is compiled, if known.
        known: the names of the inputs in `named`, and of tensors that are attributes of the graph.
        names: `known` as strings.
        changing: positions among `args` of weights that differ in every call, and are read dense.
        decided_for: the fingerprint of the weights that the plans were chosen for.
        name: the graph's name, for messages.
        calibrate: computes the calibration of weights, for the arguments of any instance.
        ranks_here: all ranks of a sharded model run this pass of this graph now.
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
    begin_token: int | None = None
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
    """The site as a Part of a NodeWeight with this plan, for the weights of any instance."""
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
    """Whether two tensors of equal shape have equal strides, which later views may depend on."""
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
        # "grapharg" would keep the example weights alive as long as the copy
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
    """A node for a value that has no literal in code; the graph's module stores it as `name`."""
    owner = graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    owner.add_submodule(name, _Constant(value))
    return graph.call_function(getattr, (graph.get_attr(name), "value"))


def erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase the nodes without users among `nodes`, last first, so that chains of them go too.

    fx's own dead-code elimination would also drop in-place methods whose result nobody reads.
    """
    for node in reversed(nodes):
        if not node.users and not is_erased(node):
            graph.erase_node(node)


def erase_dead(state: GraphState, nodes: Sequence[fx.Node]) -> None:
    """Erase the unused ones among `nodes`, then their inputs that became unused.

    Quantized matmuls stay even if unused, since each has packed inputs of its own.
    """
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        call = node.op in ("call_function", "call_method") and node not in state.packed
        if call and not (is_erased(node) or node.users or has_effects(node)):
            waiting += node.all_input_nodes
            state.graph.erase_node(node)
