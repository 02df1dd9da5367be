"""Attention as it is written, read from its end to the product of q and kᵀ, for attention.py.

composite:    scaled_dot_product_attention(q, k, v, mask, scale=s, ...)
written out:  dropout(softmax(scores, -1)) @ v, where scores are q @ kᵀ and then any of
    x * c, x / c                            the scale
    c * tanh(x / c)                         the softcap, before anything is added
    x + mask, x.masked_fill(hidden, c)      c is at most HIDDEN
    baddbmm(mask, q, kᵀ, beta=1, alpha=c)
    cat([x, sinks], -1)                     at last; softmax(...)[..., :-1] drops their weights
    x - x.max(-1, keepdim=True).values      which changes no weight

Casts may stand anywhere, operations may be in place, and batch and heads be one dimension.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fqcompile.native.interface import DTYPES
from fqcompile.passes.effects import has_effects
from fqcompile.passes.fuse_patterns import MULTIPLIES, bound_arguments, is_call
from fqcompile.passes.op_nodes import ADDS
from fqcompile.passes.state import example, same_shape
from fqcompile.weights.recipe import target_name

HIDDEN = -1e30  # put in place of a score it leaves as little of it as if it were added
_DIVIDES = ("truediv", "div", "divide", "itruediv", "div_")
_TIMES = (*MULTIPLIES, "imul", "mul_")
_PLUS = (*ADDS, "add_")
_FILLS = ("masked_fill", "masked_fill_")
_CASTS = ("to", "type", "type_as", "float")
# First letters of steps: scales before a softcap, masks after it, sinks at last.
_ORDER = re.compile("(t*c[ah]*|[tah]*)s?")
_VIEWS = ("view", "reshape", "flatten", "contiguous")


@dataclass(frozen=True)
class Step:
    """What one operation does to scores.

    times     multiplies them by `number`
    cap       number * tanh(scores / number)
    add       adds `tensor`
    hide      puts `number` where `tensor` is true
    sinks     adds `tensor` as a column

    `merged`: batch and heads are one dimension of the tensor.
    """

    name: str
    number: float = 1.0
    tensor: Any = None
    merged: bool = False


@dataclass(frozen=True)
class Attention:
    """What is computed by the nodes `inside`, of which others read the last alone.

    Attributes:
        begins: the first node whose place matters: what it reads is read at the end instead.
        scale: a number, or None for that of scaled_dot_product_attention.
        masks: what makes the mask, in order: see `Step`.
    """

    q: Any
    k: Any
    v: Any
    inside: frozenset[fx.Node]
    begins: fx.Node
    scale: float | None
    masks: tuple[Step, ...]
    sinks: Any = None
    softcap: float = 0.0
    causal: bool = False
    written_out: bool = False
    dropout: bool = False


def read_attention(node: fx.Node) -> Attention | str | None:
    """The attention that ends at the node, or why its form is not known; None for other nodes."""
    return _composite(node) or _written_out(node)


def _composite(node: fx.Node) -> Attention | None:
    if target_name(node.target) != "scaled_dot_product_attention" or len(node.args) != 6:
        return None
    given: Any = node.args
    q, k, v, mask, dropout, causal = given
    if not isinstance(causal, bool):
        return None
    scale: Any = node.kwargs.get("scale")
    masks = () if mask is None else (Step("add", tensor=mask),)
    inside = frozenset([node])
    return Attention(q, k, v, inside, node, scale, masks, causal=causal, dropout=dropout != 0)


def _written_out(node: fx.Node) -> Attention | str | None:
    if not is_call(node, ("matmul", "bmm"), 2):
        return None
    weights, v = node.args
    after = _back_to_softmax(weights)
    softmax, value = after[-1], example(after[-1])
    if not is_call(softmax, ("softmax",)) or value is None or value.dim() < 3:
        return None
    scores, dim = bound_arguments(softmax, "input", "dim")
    if dim not in (-1, value.dim() - 1):
        return f"its softmax is over dimension {dim}"
    chain = _chain(scores, set())
    if chain is None:
        return "its scores are not a product that is scaled, capped and masked"
    steps, before = chain
    product: Any = before[0]
    q, keys = product.args[-2:]
    if not _is_transpose(keys):
        return "its scores are not q @ k.transpose(-2, -1)"
    inside = frozenset([node, *after, *before])
    if any(not inside.issuperset(n.users) for n in inside if n is not node):
        return "its scores or weights have other readers"
    names = [step.name for step in steps]
    if not _ORDER.fullmatch("".join(name[0] for name in names)):
        return f"its scores are made in another order: {', '.join(names)}"
    if sum(map(_cuts_last, after)) != names.count("sinks"):
        return "what is dropped after its softmax is not what was added before"
    (q, view_q), (k, view_k), (v, view_v) = map(_apart, (q, keys.args[0], v))
    begins = min(n for n in (product, view_q, view_k, view_v) if n is not None)
    found = Attention(q, k, v, inside, begins, 1.0, (), written_out=True)
    return _with_steps(replace(found, dropout=any(map(_drops, after))), steps)


def _with_steps(call: Attention, steps: list[Step]) -> Attention:
    sinks = steps.pop().tensor if steps and steps[-1].name == "sinks" else None
    first = next((i for i, step in enumerate(steps) if step.tensor is not None), len(steps))
    scale = math.prod((step.number for step in steps if step.name == "times"), start=1.0)
    softcap = sum((step.number for step in steps if step.name == "cap"), 0.0)
    return replace(call, scale=scale, softcap=softcap, masks=tuple(steps[first:]), sinks=sinks)


def _back_to_softmax(weights: Any) -> list[Any]:
    """The nodes from the weights back to their softmax."""
    nodes = [weights]
    while _is_same(nodes[-1]) or is_call(nodes[-1], ("dropout",)) or _cuts_last(nodes[-1]):
        nodes.append(nodes[-1].args[0])
    return nodes


def _drops(node: Any) -> bool:
    if not is_call(node, ("dropout",)):
        return False
    _, p, training = bound_arguments(node, "input", "p", "training")
    return training is not False and p != 0


def _cuts_last(node: Any) -> bool:
    """x[..., :-1]"""
    index = node.args[1] if is_call(node, ("getitem",), 2) else None
    return index == (Ellipsis, slice(None, -1, None)) and example(node) is not None


def _chain(x: Any, seen: set[fx.Node]) -> tuple[list[Step], list[fx.Node]] | None:
    """What was done to a product to make x, in order, and the nodes that did, the product first."""
    if not isinstance(x, fx.Node) or x in seen:
        return None
    seen.add(x)  # it is read in one way or in none
    if is_call(x, ("matmul", "bmm"), 2):
        return [], [x]
    if is_call(x, ("baddbmm",)) and len(x.args) == 3:
        alpha, beta = x.kwargs.get("alpha"), x.kwargs.get("beta")
        if isinstance(alpha, int | float) and beta == 1:
            return [Step("times", alpha), _masking("add", x, x.args[0])], [x]
    for steps, nodes, source in _readings(x):
        found = _chain(source, seen)
        if found is not None:
            return [*found[0], *steps], [*found[1], *nodes]
    return None


def _readings(x: fx.Node) -> Iterator[tuple[list[Step], Iterable[fx.Node], Any]]:
    """Each way to read x: the last step, its nodes, and the scores before it."""
    if _is_same(x):
        yield [], [x], x.args[0]
    tanh, factor = _parted(x, _TIMES)
    if is_call(tanh, ("tanh",), 1):
        inner, divisor = _parted(tanh.args[0], _DIVIDES)
        if factor == divisor != 0:
            yield [Step("cap", factor)], {x, tanh, tanh.args[0]} - {inner}, inner
    source, number = _parted(x, _TIMES)
    if source is not x:
        yield [Step("times", number)], [x], source
    source, number = _parted(x, _DIVIDES)
    if source is not x and number:
        yield [Step("times", 1 / number)], [x], source
    if is_call(x, _FILLS, 3) and isinstance(x.args[2], int | float) and x.args[2] <= HIDDEN:
        yield [_masking("hide", x, x.args[1], x.args[2])], [x], x.args[0]
    if is_call(x, ("cat",)):
        tensors, dim = bound_arguments(x, "tensors", "dim")
        if isinstance(tensors, list | tuple) and len(tensors) == 2 and _is_column(tensors[1], dim):
            yield [Step("sinks", tensor=tensors[1])], [x], tensors[0]
    source, top = x.args if is_call(x, ("sub", "__sub__"), 2) else (None, None)
    if source is not None and (most := _largest(source, top)):
        yield [], [x, *most], source
    for source, mask in (x.args, x.args[::-1]) if is_call(x, _PLUS, 2) else ():
        if isinstance(mask, fx.Node) and (source is x.args[0] or not has_effects(x)):
            yield [_masking("add", x, mask)], [x], source


def _masking(name: str, x: fx.Node, tensor: Any, number: float = 1.0) -> Step:
    scores, given = example(x), example(tensor)
    both = scores is not None and given is not None and scores.dim() == given.dim() == 3
    merged = both and same_shape(scores.shape[:1], given.shape[:1])  # type: ignore[union-attr]
    return Step(name, number, tensor, merged)


def _is_column(tensor: Any, dim: Any) -> bool:
    value = example(tensor)
    return value is not None and value.dim() == 4 and value.shape[3] == 1 and dim in (-1, 3)


def _largest(scores: Any, top: Any) -> list[fx.Node]:
    """The nodes of scores.max(dim=-1, keepdim=True).values, if top is that."""
    most: Any = top.args[0] if is_call(top, ("getitem", "getattr"), 2) else None
    if not is_call(most, ("max",)) or top.args[1] not in (0, "values"):
        return []
    found = bound_arguments(most, "input", "dim", "keepdim")
    return [top, most] if found == [scores, -1, True] else []


def _is_same(node: Any) -> bool:
    """A cast, since sums are fp32 anyhow, or a view that leaves rows alone."""
    if not is_call(node, (*_CASTS, *_VIEWS)) or not node.args:
        return False
    value, before = example(node), example(node.args[0])
    if value is None or before is None or value.device != before.device:
        return False
    if is_call(node, _CASTS):
        return before.dtype in DTYPES and value.dtype in DTYPES
    same = same_shape(value.shape, before.shape) or _merges(value, before) or _merges(before, value)
    return same and value.dtype == before.dtype


def _merges(a: Any, b: Any) -> bool:
    """Whether [B H, S, T] and [B, H, S, T] are the shapes of a view."""
    return a.dim() == 3 and b.dim() == 4 and same_shape(a.shape[1:], b.shape[2:])


def _apart(x: Any) -> tuple[Any, fx.Node | None]:
    """x with batch and heads apart, if it is a view of that, and the view."""
    source = x.args[0] if is_call(x, _VIEWS) else None
    value, before = example(x), example(source)
    if value is not None and before is not None and _merges(value, before):
        return source, x
    return x, None


def _parted(node: Any, names: tuple[str, ...]) -> tuple[Any, float]:
    """(x, c) of x * c, c * x or x / c; else the node itself, and 1."""
    if is_call(node, names, 2):
        x, number = node.args
        if isinstance(x, int | float) and names is _TIMES:
            x, number = number, x
        if isinstance(number, int | float):
            return x, float(number)
    return node, 1.0


def _is_transpose(keys: Any) -> bool:
    if is_call(keys, ("getattr",), 2):
        return bool(keys.args[1] == "mT")
    value = example(keys)
    if value is None or not is_call(keys, ("transpose",), 3):
        return False
    return sorted(d % value.dim() for d in keys.args[1:]) == [value.dim() - 2, value.dim() - 1]
