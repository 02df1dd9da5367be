"""Products: how a matmul is written, as two operands and a result with named dimensions.

F.linear(x, w, b)                 b k   , n k     -> b n
x @ w, matmul, mm, bmm            b m k , b k n   -> b m n     the last ones of a batch meet
addmm(b, x, w), addmv, baddbmm    the same, plus b
conv2d(x, w, b), 1 x 1            b k h w , n k 1 1 -> b n h w
mv(w, x)                          n k   , k       -> n
_grouped_mm(x, w, offs=o)         m k   , E k n   -> m n       rows sorted by expert
transformers::grouped_mm_fallback the same, with zeros for rows beyond the last offset
einsum                            as it says

The only reader of calls of matmuls; `normalize` has put their arguments in one order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fqcompile.passes.effects import has_effects
from fqcompile.passes.einsum import Names, einsum_indices, last
from fqcompile.passes.state import example
from fqcompile.torch_compat import hint_of
from fqcompile.weights.recipe import target_name

Call = tuple[Any, ...]  # the arguments of a call, keyword arguments last
# Of a convolution. For more, arithmetic is the limit, not reading weights, and to move each pixel's
# channels beside each other and back costs what is left to gain.
MOST_PIXELS = 128
STACK = "expert"  # the name of the stack's first dimension, which ids or offsets index


@dataclass(frozen=True)
class Operand:
    """A tensor with names of its dimensions, except those in `singles`, which have size one."""

    node: fx.Node
    dims: Names
    singles: tuple[int, ...] = ()

    @property
    def sizes(self) -> dict[str, Any]:
        kept = [size for dim, size in enumerate(shape_of(self.node)) if dim not in self.singles]
        return dict(zip(self.dims, kept, strict=True))


@dataclass(frozen=True)
class Product:
    """left @ right + bias.

    Attributes:
        out: the names of the result's dimensions.
        offsets: the end of each expert's rows, if rows are sorted by expert.
        zero_rest: rows beyond the last offset are zeros.
        of_layer: the right operand is the weight, and a bias has one value for each n; else the
            weight is the constant one of the two.
        broadcasts: a batch of equal matrices counts as one matrix; not for einsum.
    """

    left: Operand
    right: Operand
    out: Names
    bias: fx.Node | None = None
    offsets: fx.Node | None = None
    zero_rest: bool = False
    of_layer: bool = False
    broadcasts: bool = False

    @property
    def sides(self) -> list[tuple[Operand, Operand]]:
        """The possible pairs (weight, x), in the order in which they are tried."""
        both = [(self.right, self.left), (self.left, self.right)]
        return both[:1] if self.of_layer else both


def product(node: fx.Node) -> Product | None:
    """The node read as a product of two tensors, or None if it is none."""
    read = _READERS.get(target_name(node.target))
    if read is None or has_effects(node):
        return None
    return read(node, (*node.args, *node.kwargs.values()))


def _linear(node: fx.Node, call: Call) -> Product | None:
    match call:
        case (fx.Node() as x, fx.Node() as weight, bias) if _ndim(weight) == 2:
            rows = [f"d{i}" for i in range(_ndim(x) - 1)]
            left, right = Operand(x, [*rows, "k"]), Operand(weight, ["n", "k"])
            return Product(left, right, [*rows, "n"], bias, of_layer=True)
    return None


def _conv(node: fx.Node, call: Call) -> Product | None:
    """A convolution of few pixels that reads one for each of its result's, of all channels."""
    match call:
        case (fx.Node() as x, fx.Node() as weight, bias, *steps, 1) if _ndim(x) == _ndim(weight):
            kernel = shape_of(weight)[2:]
            plain = all(
                _all_are(given, wanted) for given, wanted in zip(steps, (1, 0, 1), strict=True)
            )
            if plain and all(size == 1 for size in kernel) and _pixels(x) <= MOST_PIXELS:
                pixels = [f"d{i}" for i in range(len(kernel))]
                singles = tuple(range(2, 2 + len(kernel)))
                left, right = Operand(x, ["b", "k", *pixels]), Operand(weight, ["n", "k"], singles)
                return Product(left, right, ["b", "n", *pixels], bias, of_layer=True)
    return None


def _pixels(x: fx.Node) -> int:
    """Of all images or signals [b, k, ...]; of open sizes, in the call that is compiled."""
    batch, _, *size = shape_of(x)
    return math.prod(hint_of(one) or 1 for one in (batch, *size))


def _all_are(given: Any, wanted: int) -> bool:
    return all(one == wanted for one in (given if isinstance(given, list | tuple) else [given]))


def _matmul(node: fx.Node, call: Call, bias: fx.Node | None = None) -> Product | None:
    match call:
        case (fx.Node() as left, fx.Node() as right) if min(_ndim(left), _ndim(right)) >= 1:
            batch = [f"b{i}" for i in range(max(_ndim(left), _ndim(right)) - 2)]
            rows, columns = ["m", "k"][-_ndim(left) :], ["k", "n"][: _ndim(right)]
            out = [*batch, *rows[:-1], *columns[1:]]
            if len(out) == _ndim(node):
                first = Operand(left, [*last(batch, _ndim(left) - 2), *rows])
                second = Operand(right, [*last(batch, _ndim(right) - 2), *columns])
                return Product(first, second, out, bias, broadcasts=True)
    return None


def _mv(node: fx.Node, call: Call) -> Product | None:
    """Autocast on CPUs leaves mv in its inputs' dtype, unlike every other form and our op."""
    autocast = any(target_name(n.target) == "_enter_autocast" for n in node.graph.nodes)
    return None if autocast or torch.is_autocast_enabled("cpu") else _matmul(node, call)


def _addmm(node: fx.Node, call: Call) -> Product | None:
    """Only with beta = alpha = 1. In the deprecated argument order, the first one is a number."""
    match call:
        case (fx.Node() as bias, left, right, 1, 1):
            return _matmul(node, (left, right), bias)
    return None


def _grouped_mm(node: fx.Node, call: Call) -> Product | None:
    """Without a bias: PyTorch does not support that argument yet."""
    out = example(node)
    match call:
        case (x, weight, offsets, None, dtype) if out is not None and dtype in (None, out.dtype):
            if offsets is not None:
                return _sorted(x, weight, offsets)
            each = _matmul(node, (x, weight))
            return each and replace(each, broadcasts=False)
    return None


def _fallback(node: fx.Node, call: Call) -> Product | None:
    match call:
        case (x, weight, offsets):
            return _sorted(x, weight, offsets, zero_rest=True)
    return None


def _sorted(x: Any, weight: Any, offsets: Any, *, zero_rest: bool = False) -> Product | None:
    if (_ndim(x), _ndim(weight)) != (2, 3):
        return None
    left, right = Operand(x, ["m", "k"]), Operand(weight, [STACK, "k", "n"])
    return Product(left, right, ["m", "n"], offsets=offsets, zero_rest=zero_rest)


def _einsum(node: fx.Node, call: Call) -> Product | None:
    match call:
        case (str() as equation, fx.Node() as left, fx.Node() as right):
            names = einsum_indices(equation, (_ndim(left), _ndim(right)))
            if names is not None:
                x, y, out = names
                return Product(Operand(left, x), Operand(right, y), out)
    return None


def shape_of(node: object) -> tuple[Any, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)


def _ndim(node: object) -> int:
    value = example(node)
    return -1 if value is None else value.dim()


_READERS: dict[str, Callable[[fx.Node, Call], Product | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "mv": _mv,
    "bmm": _matmul,
    "addmm": _addmm,
    "addmv": _addmm,
    "baddbmm": _addmm,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "einsum": _einsum,
    "_grouped_mm": _grouped_mm,
    "grouped_mm": _grouped_mm,
    "transformers.grouped_mm_fallback": _fallback,
    "transformers.grouped_mm_fallback.default": _fallback,
}
PRODUCTS = frozenset(_READERS)
OF_LAYERS = frozenset(("linear", "conv1d", "conv2d", "conv3d"))  # one weight for all rows
