"""The surface forms of a linear layer: each reads a graph node as x, weight, bias, or declines.

F.linear(x, w, b)                       w [N, K]
x @ w, matmul, mm, addmm(b, x, w)       w [K, N]: GPT-2's Conv1D
w @ x, mv(w, x)                         w [N, K], x [..., K, M]: transposed around
bmm(x, w), baddbmm(b, x, w)             w [1, K, N], or [K, N] expanded over the batch
einsum("bsd,dhk->bshk", x, w)           any two-operand contraction without a shared batch index
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fqcompile.passes.base import example, same_shape
from fqcompile.passes.effects import has_effects
from fqcompile.passes.einsum import LinearEinsum, linear_einsum
from fqcompile.passes.sites import GraphStep
from fqcompile.weights.recipe import target_name

IsConstant = Callable[[object], bool]
_EXPANDS = ("expand", "expand_as", "broadcast_to")
_T = GraphStep("transpose", (-1, -2))


@dataclass(frozen=True)
class LinearForm:
    """y = out_steps(x_steps(x) @ Wᵀ) + bias, where W = weight_steps(weight) is [N, K]."""

    x: fx.Node
    weight: fx.Node
    weight_steps: tuple[GraphStep, ...] = ()
    bias: fx.Node | None = None
    x_steps: tuple[GraphStep, ...] = ()
    out_steps: tuple[GraphStep, ...] = ()


def linear_form(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    """The node as a linear layer with a constant weight, or None where it is not one."""
    read = _READERS.get(node.target) or _READERS.get(target_name(node.target))
    form = None if read is None or has_effects(node) else read(node, is_constant)
    if form is None or not form.out_steps or not _is_contiguous(node):
        return form
    # a view of the result that eager allows must still be possible
    return replace(form, out_steps=(*form.out_steps, GraphStep("contiguous")))


def _bind(node: fx.Node, *names: str) -> dict[str, Any]:
    """The call's arguments by name; absent ones are None."""
    bound = dict.fromkeys(names) | dict(zip(names, node.args, strict=False))
    return bound | dict(node.kwargs)


def _linear(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    call = _bind(node, "input", "weight", "bias")
    if not is_constant(call["weight"]) or _ndim(call["weight"]) != 2:
        return None
    return LinearForm(call["input"], call["weight"], bias=call["bias"])


def _matmul(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    left, right = node.args if len(node.args) == 2 else _bind(node, "input", "other").values()
    return _product(node, left, right, is_constant)


def _mm(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    call = _bind(node, "input", "mat2")
    return _product(node, call["input"], call["mat2"], is_constant)


def _mv(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    """Autocast on CPUs leaves mv in its inputs' dtype, unlike every other form and our op."""
    autocast = any(target_name(n.target) == "_enter_autocast" for n in node.graph.nodes)
    if autocast or torch.is_autocast_enabled("cpu"):
        return None
    call = _bind(node, "input", "vec")
    return _product(node, call["input"], call["vec"], is_constant)


def _addmm(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    call = {"beta": 1, "alpha": 1} | _bind(node, "input", "mat1", "mat2")
    return _biased(node, call, call["mat1"], call["mat2"], is_constant)


def _baddbmm(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    call = {"beta": 1, "alpha": 1} | _bind(node, "input", "batch1", "batch2")
    return _biased(node, call, call["batch1"], call["batch2"], is_constant)


def _biased(
    node: fx.Node, call: dict[str, Any], left: object, right: object, is_constant: IsConstant
) -> LinearForm | None:
    form = _product(node, left, right, is_constant)
    # The old order of arguments, addmm(beta, input, ...), leaves a number where the bias is read.
    scaled = call["beta"] != 1 or call["alpha"] != 1 or not isinstance(call["input"], fx.Node)
    return None if form is None or scaled else replace(form, bias=call["input"])


def _product(
    node: fx.Node, left: object, right: object, is_constant: IsConstant
) -> LinearForm | None:
    """left @ right with one constant side, and no batch that comes from the weight alone."""
    weight, squeeze = _unbatched(right)
    if is_constant(weight) and not is_constant(left) and isinstance(left, fx.Node):
        if weight is None or _ndim(weight) - len(squeeze) != 2:
            return None
        same_rows = same_shape(_shape(node)[:-1], _shape(left)[:-1])
        return LinearForm(left, weight, (*squeeze, _T)) if same_rows else None
    weight, squeeze = _unbatched(left)
    if is_constant(weight) and not is_constant(right) and isinstance(right, fx.Node):
        if weight is None or _ndim(weight) - len(squeeze) != 2 or _ndim(right) != _ndim(node):
            return None
        if _ndim(right) == 1:
            return LinearForm(right, weight, squeeze)
        if not same_shape(_shape(node)[:-2], _shape(right)[:-2]):
            return None
        return LinearForm(right, weight, squeeze, x_steps=(_T,), out_steps=(_T,))
    return None


def _unbatched(operand: object) -> tuple[fx.Node | None, tuple[GraphStep, ...]]:
    """The matrix under a batch of equal copies: [1, K, N], or [K, N] expanded to [B, K, N]."""
    if not isinstance(operand, fx.Node):
        return None, ()
    if target_name(operand.target) in _EXPANDS and isinstance(operand.args[0], fx.Node):
        base = operand.args[0]
        whole = _ndim(operand) == 3 and same_shape(_shape(base)[-2:], _shape(operand)[-2:])
        if whole and (_ndim(base) == 2 or (_ndim(base) == 3 and _shape(base)[0] == 1)):
            operand = base
    if _ndim(operand) == 3 and _shape(operand)[0] == 1:
        return operand, (GraphStep("squeeze", (0,)),)
    return operand, ()


def _einsum(node: fx.Node, is_constant: IsConstant) -> LinearForm | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    constant = [is_constant(operand) for operand in operands]
    if not isinstance(equation, str) or len(operands) != 2 or sum(constant) != 1:
        return None
    position = constant.index(True)
    weight, x = operands[position], operands[1 - position]
    assert isinstance(weight, fx.Node) and isinstance(x, fx.Node)
    plan = linear_einsum(equation, position, _shape(weight), _shape(x))
    return None if plan is None else _from_einsum(x, weight, plan)


def _from_einsum(x: fx.Node, weight: fx.Node, plan: LinearEinsum) -> LinearForm:
    return LinearForm(
        x,
        weight,
        tuple(GraphStep(*step) for step in plan.weight_steps),
        x_steps=tuple(GraphStep(*step) for step in plan.x_steps),
        out_steps=tuple(GraphStep(*step) for step in plan.out_steps),
    )


def _is_contiguous(node: object) -> bool:
    value = example(node)
    return value is not None and value.is_contiguous()


def _ndim(node: object) -> int:
    value = example(node)
    return -1 if value is None else value.dim()


def _shape(node: object) -> tuple[int, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)


_READERS: dict[object, Callable[[fx.Node, IsConstant], LinearForm | None]] = {
    "linear": _linear,
    operator.matmul: _matmul,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _mm,
    "mv": _mv,
    "bmm": _mm,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
}
