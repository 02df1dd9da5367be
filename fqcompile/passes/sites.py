"""Sites: the matmuls with constant weights that match finds, and what later passes decide of them.

LinearSite    y = x @ wᵀ + bias               w [N, K]
ExpertSite    y[p] = x[p] @ w[e(p)]ᵀ + bias   w [E, N, K], each row of x with its expert
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from fqcompile.passes.expert_einsum import ExpertEinsum
from fqcompile.quant.choose import QuantPlan
from fqcompile.weights.node_weight import NodeWeight
from fqcompile.weights.recipe import WeightRecipe


@dataclass(frozen=True)
class GraphStep:
    """A tensor method that rewriting puts before or after the op: `value.method(*args)`."""

    method: str
    args: tuple[Any, ...] = ()


@dataclass(eq=False, kw_only=True)
class WeightSite:
    """What sites of both kinds have.

    Attributes:
        kind: what a plan calls it.
        node: the matmul in the captured graph.
        x: the activation.
        bias: added to the result where the form has one; may be any shape that `add` accepts.
        weight: the node that is multiplied with.
        recipe, sources: how it comes from the graph's constant inputs.
        shape: (N, K) or (E, N, K) of what the recipe computes.
        part: "[0]", "[1]" where several sites read one parameter in different ways; ends the name.
        head: an output head: of a usual name, or one whose weight is an embedding's table too.
        tables: the sources single rows of which are read as well, by what keeps their values.
        reason: why the site stays as it is; None while it may be quantised.
        settled: the reason lies in the graph and the options, and holds whatever the weights are.
        plan, packed: set by choose and by quantize.
        op: the node that computes the site, kept current from rewrite on.
    """

    kind: str
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    recipe: WeightRecipe
    sources: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    bias: fx.Node | None = None
    name: str = ""
    part: str = ""
    head: bool = False
    tables: tuple[fx.Node, ...] = ()
    reason: str | None = None
    settled: bool = False
    plan: QuantPlan | None = None
    packed: NodeWeight | None = None
    op: fx.Node | None = None

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(eq=False, kw_only=True)
class LinearSite(WeightSite):
    """One matrix; `x_steps` bring x to [..., K], `out_steps` the result to node's shape."""

    kind: str = "linear"
    x_steps: tuple[GraphStep, ...] = ()
    out_steps: tuple[GraphStep, ...] = ()


@dataclass(eq=False, kw_only=True)
class ExpertSite(WeightSite):
    """A stack of experts; of kind "other" where it only has their form, a matrix for each head.

    `indices` arrange x and the result around [rows, K] -> [rows, N]; None: they have these shapes.
    `routing` is the node of the offsets or ids; None where every expert has equally many rows.
    `gather` are the nodes from stack[routing] to the weight. `zero_rest`: rows that belong to no
    expert are zeros in the result; else whatever was in memory.
    """

    kind: str = "experts"
    form: Literal["grouped", "gathered"]
    routing: fx.Node | None
    indices: ExpertEinsum | None
    gather: tuple[fx.Node, ...] = ()
    zero_rest: bool = False


@dataclass(frozen=True)
class KeptWeight:
    """A constant matrix that no form reads, with what reads it; listed, never quantised.

    `identity` is the `id` of the tensor, which the graph must not keep alive; `input` its position
    among the inputs, if it is one; `table` whether it is called after who reads its rows.
    """

    identity: int
    input: int | None
    name: str
    table: bool
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str
