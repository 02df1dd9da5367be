"""Sites: the matmuls with constant weights that match finds, and what later passes decide of them.

linear     y = x @ wᵀ + bias               w [N, K]
experts    y[p] = x[p] @ w[e(p)]ᵀ + bias   w [E, N, K], each row of x with its expert
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from fqcompile.quant.choose import QuantPlan
from fqcompile.weights.node_weight import NodeWeight
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
        """What says which expert a row belongs to."""
        return self.ids or self.offsets

    @property
    def of_experts(self) -> bool:
        """Whether there is a matrix for each expert, rather than one."""
        return bool(self.batch) or self.offsets is not None


@dataclass(eq=False, kw_only=True)
class WeightSite:
    """A matmul with a constant weight.

    Attributes:
        kind: what a plan calls it; "other" has the form of experts alone, a matrix for each head.
        node: the matmul in the captured graph.
        contraction: what it multiplies, and how.
        recipe, sources: how the weight comes from the graph's constant inputs.
        shape: (N, K) or (E, N, K) of what the recipe computes.
        part: "[0]", "[1]" where several sites read one parameter in different ways; ends the name.
        head: an output head: of a usual name, or one whose weight is an embedding's table too.
        tables: the sources single rows of which are read as well, by what keeps their values.
        reason: why the site stays as it is; None while it may be quantised.
        settled: the reason lies in the graph and the options, and holds whatever the weights are.
        plan, packed: set by choose and by quantize.
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
    packed: NodeWeight | None = None
    op: fx.Node | None = None

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


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
