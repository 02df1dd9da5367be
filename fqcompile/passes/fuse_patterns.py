"""Patterns that fuse recognizes after a matmul: activations and gated units."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fqcompile.kernels.epilogue import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT
from fqcompile.passes.state import example
from fqcompile.weights.recipe import target_name

MULTIPLIES = ("mul", "__mul__", "multiply")
_ADDS = ("add", "__add__")
_CLAMPS = ("clamp", "clip")


def is_call(node: Any, names: tuple[str, ...], count: int | None = None) -> bool:
    """Whether the node calls one of these names; `count`: with so many arguments, positional."""
    if not isinstance(node, fx.Node) or target_name(node.target) not in names:
        return False
    return count is None or (len(node.args) == count and not node.kwargs)


@dataclass(frozen=True)
class Half:
    """A half of the last dimension of `value`: the first or `second`, contiguous or interleaved."""

    value: fx.Node
    second: bool
    interleaved: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class GatedUnit:
    """A gated unit: `value` holds gate and up as halves of its last dimension."""

    value: fx.Node
    activation: str
    interleaved: bool


def activation_name(node: object) -> str | None:
    """The node's name in the table of activations; None if it is no activation."""
    if not isinstance(node, fx.Node):
        return None
    name = target_name(node.target)
    if name == "gelu":
        approximate = node.kwargs.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
    known = name in ("relu", "silu", "relu_", "silu_") and not node.args[1:]
    return name.removesuffix("_") if known else None


def gated_unit(node: fx.Node) -> GatedUnit | None:
    """The product `node` as a gated unit whose parts have no other users, or None.

    gate, up = v.chunk(2, -1); act(gate) * up                       halves side by side
    gate, up = v[..., ::2], v[..., 1::2]                            every other column
    g = gate.clamp(max=7); (up.clamp(-7, 7) + 1) * (g * sigmoid(1.702 * g))    "swiglu_oai"
    """
    if not is_call(node, MULTIPLIES, 2):
        return None
    for gate_side, up_side in (node.args, node.args[::-1]):
        for name, gate, up, between in _readings(gate_side, up_side):
            alike = gate.value is up.value and gate.interleaved == up.interleaved
            if alike and not gate.second and up.second and gate.value is not node:
                inside = {*gate.nodes, *up.nodes, *between}
                if _closed(inside, node, gate.value):
                    return GatedUnit(gate.value, name, gate.interleaved)
    return None


def _readings(
    gate_side: Any, up_side: Any
) -> Iterator[tuple[str, Half, Half, tuple[fx.Node, ...]]]:
    name = activation_name(gate_side)
    if name is not None:
        gate, up = _half(gate_side.args[0]), _half(up_side)
        if gate is not None and up is not None:
            yield name, gate, up, (gate_side,)
    found = _oai_gate(gate_side), _oai_up(up_side)
    if found[0] is not None and found[1] is not None:
        gate, up = _half(found[0][0]), _half(found[1][0])
        if gate is not None and up is not None:
            yield "swiglu_oai", gate, up, (*found[0][1], *found[1][1])


def _closed(inside: set[fx.Node], end: fx.Node, start: fx.Node) -> bool:
    """Whether all users of `start` and of the nodes inside are inside or are `end`."""
    return all(set(node.users) <= {*inside, end} for node in {*inside, start})


def _half(node: Any) -> Half | None:
    if not isinstance(node, fx.Node) or not node.args:
        return None
    name, source = target_name(node.target), node.args[0]
    if name == "narrow" and isinstance(source, fx.Node) and len(node.args) == 4:
        dim, start, length = node.args[1:]
        return _range(node, source, start, length) if _is_last(source, dim) else None
    if name != "getitem" or not isinstance(source, fx.Node):
        return None
    index = node.args[1]
    if target_name(source.target) in ("chunk", "split") and isinstance(index, int):
        return _piece(node, source, index)
    return _slice(node, source, index) if isinstance(index, tuple) else None


def _piece(node: fx.Node, pieces: fx.Node, index: int) -> Half | None:
    """v.chunk(2, -1)[i], or v.split(half, -1)[i]."""
    value, dim, parts = pieces.args[0], pieces.args[-1], pieces.meta.get("example_value")
    if len(pieces.args) != 3 or not isinstance(value, fx.Node) or not _is_last(value, dim):
        return None
    if not isinstance(parts, list | tuple) or len(parts) != 2 or index not in (0, 1, -1, -2):
        return None
    if parts[0].shape[-1] != parts[1].shape[-1]:
        return None
    return Half(value, index in (1, -1), False, (node, pieces))


def _slice(node: fx.Node, value: fx.Node, index: tuple[Any, ...]) -> Half | None:
    """v[..., ::2], v[..., 1::2], v[..., :half] or v[..., half:]."""
    *others, last = index
    if not isinstance(last, slice) or any(o is not Ellipsis and o != slice(None) for o in others):
        return None
    if Ellipsis not in others and len(index) != _ndim(value):
        return None
    begins, even = last.start in (None, 0, 1), _width(value) % 2 == 0
    if last.step == 2 and begins and last.stop is None and even:
        return Half(value, last.start == 1, True, (node,))
    numbers = all(isinstance(i, int | None) for i in (last.start, last.stop))
    if last.step not in (None, 1) or not numbers:
        return None
    start, stop, _ = last.indices(_width(value))
    return _range(node, value, start, stop - start)


def _range(node: fx.Node, value: fx.Node, start: Any, length: Any) -> Half | None:
    width = _width(value)
    if width % 2 or length != width // 2 or start not in (0, width // 2):
        return None
    return Half(value, start > 0, False, (node,))


def _oai_gate(node: Any) -> tuple[Any, tuple[fx.Node, ...]] | None:
    """g * sigmoid(g * alpha) with g = gate.clamp(max=limit): the gate, and the nodes between."""
    if not is_call(node, MULTIPLIES, 2):
        return None
    for clamped, sigmoid in (node.args, node.args[::-1]):
        if not is_call(sigmoid, ("sigmoid",), 1) or not is_call(sigmoid.args[0], MULTIPLIES, 2):
            continue
        steep = sigmoid.args[0]
        if set(steep.args) == {clamped, SWIGLU_OAI_ALPHA}:
            gate = _clamped(clamped, None, SWIGLU_OAI_LIMIT)
            return None if gate is None else (gate, (node, sigmoid, steep, clamped))
    return None


def _oai_up(node: Any) -> tuple[Any, tuple[fx.Node, ...]] | None:
    """up.clamp(-limit, limit) + 1: up, and the nodes between."""
    if not is_call(node, _ADDS, 2) or 1 not in node.args:
        return None
    clamped = next(arg for arg in node.args if arg != 1)
    up = _clamped(clamped, -SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT)
    return None if up is None else (up, (node, clamped))


def _clamped(node: Any, low: float | None, high: float) -> Any | None:
    """The input of the node if it clamps to exactly these bounds, else None."""
    if not is_call(node, _CLAMPS):
        return None
    value, *bounds = bound_arguments(node, "input", "min", "max")
    return value if bounds == [low, high] else None


def bound_arguments(call: fx.Node, *names: str) -> list[Any]:
    """The call's first arguments, which have these names; None for those left out."""
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    return [given.get(name) for name in names]


def _is_last(value: fx.Node, dim: Any) -> bool:
    return isinstance(dim, int) and dim in (-1, _ndim(value) - 1)


def _ndim(node: fx.Node) -> int:
    value = example(node)
    return -1 if value is None else value.dim()


def _width(node: fx.Node) -> int:
    """The size of the last dimension; 1 if it is not a number."""
    value = example(node)
    size = 1 if value is None or not value.dim() else value.shape[-1]
    return size if isinstance(size, int) else 1
