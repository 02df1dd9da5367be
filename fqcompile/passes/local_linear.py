"""Which linears on DTensors each rank can compute from its own parts alone.

X replicated,    W by rows       ->   Y by its last dimension     "column-wise"
X by its last,   W by columns    ->   Y a sum over the ranks      "row-wise": B is added later
X in any way,    W replicated    ->   Y as X
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import eq
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.distributed.shards import is_dtensor, local_part, partial_sum
from fqcompile.passes.base import example
from fqcompile.weights.recipe import target_name

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ROWS, _COLUMNS = 0, 1


@dataclass(frozen=True)
class LocalLinear:
    """y = linear(x, w, b) on local parts.

    Attributes:
        local_bias: the bias is added to each rank's part; else to the whole, if there is one.
        out: the placements of y.
        whole: shape and stride of y, where its parts do not tell.
        grad_of_x: how the gradient of x's part lies, where not as x does.
    """

    x: fx.Node
    bias: fx.Node | None
    local_bias: bool
    out: tuple[Any, ...]
    whole: Mapping[str, Any]
    grad_of_x: dict[str, Any]


def local_linear(node: fx.Node, weight: fx.Node) -> LocalLinear | None:
    """The node as a linear with this weight whose parts multiply without communication."""
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
    # What every rank would add to its part of a sum is added once, to the sum.
    local_bias = "sum" not in kinds
    if is_dtensor(b) and local_bias and not all(map(_adds, kinds, x.placements, b.placements)):
        return None
    gradient = [
        partial_sum() if kind == "rows" else own
        for kind, own in zip(kinds, x.placements, strict=True)
    ]
    grad_of_x = {"grad_placements": gradient} if "rows" in kinds else {}
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
    """What one dimension of the mesh does, by the placements on it."""
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
    """How `from_local` is told the whole's shape; None where it cannot be.

    Sizes that vary from call to call are left to it: it multiplies those of the part.
    """
    if all(isinstance(size, int) for size in (*y.shape, *y.stride())):
        return {"shape": tuple(y.shape), "stride": tuple(y.stride())}
    parts = [size * _ranks_along(y, dim) for dim, size in enumerate(local_part(y).shape)]
    even = all(map(statically_known_true, map(eq, parts, y.shape)))
    return {} if even else None


def _ranks_along(y: "DTensor", dim: int) -> int:
    sizes = zip(y.placements, y.device_mesh.shape, strict=True)
    return math.prod(size for placed, size in sizes if placed.is_shard(dim))
