"""The surface forms of experts: each reads a graph node as x, a constant stack and its routing.

_grouped_mm(x, w, offs=o)               x [S, K] sorted by expert, w [E, K, N], o [E]     "grouped"
transformers::grouped_mm_fallback       the same, with zeros for rows beyond the last offset
bmm(w[ids], x[..., None])               w [E, N, K]: rows gathered, one id each           "gathered"
x[:, None] @ w[ids], baddbmm            w [E, K, N]
einsum("ti,taoi->tao", x, w[ids])       ids [t, a]
bmm(x, w), x @ w, einsum("egcm,emh->egch", x, w)
                                        x [E, C, K]: equally many rows for every expert   "grouped"

What stands between w[ids] and the product (transposes, casts, a chunk of its rows) counts as part
of the stack.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from fqcompile.passes.base import example, same_shape
from fqcompile.passes.effects import has_effects
from fqcompile.passes.einsum import einsum_indices
from fqcompile.passes.expert_einsum import STACK, ExpertEinsum, Step, expert_einsum
from fqcompile.passes.gather import Gathered, gathered
from fqcompile.weights.recipe import target_name

IsConstant = Callable[[object], bool]


@dataclass(frozen=True)
class ExpertForm:
    """y = x @ w[expert of the row]ᵀ + bias, where w = weight_steps(stack) is [E, N, K].

    `weight` is the node that was multiplied with; `indices` is None where x is [S, K]; `gather` are
    the nodes from stack[routing] to the weight; `zero_rest`: rows of no expert are zeros in y.
    """

    x: fx.Node
    weight: fx.Node
    stack: fx.Node
    weight_steps: tuple[Step, ...]
    form: Literal["grouped", "gathered"]
    routing: fx.Node | None
    indices: ExpertEinsum | None = None
    bias: fx.Node | None = None
    gather: tuple[fx.Node, ...] = ()
    zero_rest: bool = False


def expert_form(node: fx.Node, is_constant: IsConstant) -> ExpertForm | None:
    """The node as experts with constant weights, or None where it is no such thing."""
    read = _READERS.get(node.target) or _READERS.get(target_name(node.target))
    return None if read is None or has_effects(node) else read(node, is_constant)


def _bind(node: fx.Node, *names: str) -> dict[str, Any]:
    bound = dict.fromkeys(names) | dict(zip(names, node.args, strict=False))
    return bound | dict(node.kwargs)


def _grouped_mm(node: fx.Node, is_constant: IsConstant) -> ExpertForm | None:
    """`offs` are the ends of the experts' rows; PyTorch has no meaning for `bias` yet."""
    call = _bind(node, "input", "mat2", "offs", "bias", "out_dtype")
    x, weight, offsets = call["input"], call["mat2"], call["offs"]
    out = example(node)
    if call["bias"] is not None or call["out_dtype"] not in (None, out is not None and out.dtype):
        return None
    if offsets is None:
        return _contraction(node, x, weight, is_constant)
    if is_constant(x) or not is_constant(weight) or (_ndim(x), _ndim(weight)) != (2, 3):
        return None
    steps = (("transpose", (-2, -1)),)
    return ExpertForm(x, weight, weight, steps, "grouped", offsets)


def _fallback(node: fx.Node, is_constant: IsConstant) -> ExpertForm | None:
    call = _bind(node, "input", "weight", "offs")
    x, weight = call["input"], call["weight"]
    if is_constant(x) or not is_constant(weight) or (_ndim(x), _ndim(weight)) != (2, 3):
        return None
    steps = (("transpose", (-2, -1)),)
    return ExpertForm(x, weight, weight, steps, "grouped", call["offs"], zero_rest=True)


def _matmul(node: fx.Node, is_constant: IsConstant) -> ExpertForm | None:
    left, right = node.args if len(node.args) == 2 else _bind(node, "input", "other").values()
    return _contraction(node, left, right, is_constant)


def _bmm(node: fx.Node, is_constant: IsConstant) -> ExpertForm | None:
    call = _bind(node, "input", "mat2")
    return _contraction(node, call["input"], call["mat2"], is_constant)


def _baddbmm(node: fx.Node, is_constant: IsConstant) -> ExpertForm | None:
    call = {"beta": 1, "alpha": 1} | _bind(node, "input", "batch1", "batch2")
    form = _contraction(node, call["batch1"], call["batch2"], is_constant)
    scaled = call["beta"] != 1 or call["alpha"] != 1 or not isinstance(call["input"], fx.Node)
    return None if form is None or scaled else replace(form, bias=call["input"])


def _contraction(
    node: fx.Node, left: object, right: object, is_constant: IsConstant
) -> ExpertForm | None:
    """left @ right by matmul's rules, as an einsum over named dimensions."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    dims, left_dims, right_dims = _ndim(node), _ndim(left), _ndim(right)
    batch = [f"b{i}" for i in range(max(left_dims, right_dims) - 2)]
    own = [["k"] if left_dims == 1 else ["m", "k"], ["k"] if right_dims == 1 else ["k", "n"]]
    names = [
        [*batch[len(batch) - (n - len(o)) :], *o] if n > len(o) else o
        for n, o in zip((left_dims, right_dims), own, strict=True)
    ]
    out = [*batch, *own[0][:-1], *own[1][1:]]
    if len(out) != dims or min(left_dims, right_dims) < 1:
        return None
    return _product(node, [left, right], names, out, is_constant)


def _einsum(node: fx.Node, is_constant: IsConstant) -> ExpertForm | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    parsed = einsum_indices(equation, [_ndim(operand) for operand in operands])
    if parsed is None:
        return None
    *names, out = parsed
    return _product(node, operands, names, out, is_constant)  # type: ignore[arg-type]


def _product(
    node: fx.Node,
    operands: Sequence[fx.Node],
    names: Sequence[list[str]],
    out: list[str],
    is_constant: IsConstant,
) -> ExpertForm | None:
    """The operand that is a stack, or was gathered from one, as the weight."""
    for (weight, weight_names), (x, x_names) in _both_ways(operands, names):
        if is_constant(x):
            continue
        picked = gathered(weight, is_constant)
        if picked is not None:
            return _gathered(x, x_names, weight, weight_names, out, picked)
        if is_constant(weight) and len(weight_names) >= 3:
            return _every_expert(x, x_names, weight, weight_names, out)
    return None


def _both_ways(
    operands: Sequence[fx.Node], names: Sequence[list[str]]
) -> Iterator[tuple[tuple[fx.Node, list[str]], tuple[fx.Node, list[str]]]]:
    pairs = list(zip(operands, names, strict=True))
    yield pairs[1], pairs[0]
    yield pairs[0], pairs[1]


def _gathered(
    x: fx.Node,
    x_names: list[str],
    weight: fx.Node,
    weight_names: list[str],
    out: list[str],
    picked: Gathered,
) -> ExpertForm | None:
    original = [weight_names[picked.dims.index(i)] for i in range(len(weight_names))]
    batch = original[: picked.num_ids]
    stack = [STACK, *original[picked.num_ids :]]
    x_names, singles = _without_singles(x, x_names, weight, weight_names)
    ids, sizes = zip(batch, _shape(picked.ids), strict=True), _sizes(x, x_names, singles)
    if not all(same_shape([size], [sizes.get(i, size)]) for i, size in ids):
        return None  # a single id, broadcast over rows of x
    indices = _indices(x, x_names, singles, picked.shape, stack, out, batch)
    if indices is None:
        return None
    steps = (*picked.steps, *indices.weight_steps)
    return ExpertForm(
        x, weight, picked.stack, steps, "gathered", picked.ids, indices, gather=picked.nodes
    )


def _every_expert(
    x: fx.Node, x_names: list[str], weight: fx.Node, weight_names: list[str], out: list[str]
) -> ExpertForm | None:
    batch = [i for i in weight_names if i in x_names and i in out]
    if not batch:
        return None
    shape = tuple(map(int, _shape(weight)))  # of a constant: `int` fixes what Dynamo left symbolic
    indices = _indices(x, x_names, (), shape, weight_names, out, batch)
    if indices is None:
        return None
    return ExpertForm(x, weight, weight, indices.weight_steps, "grouped", None, indices)


def _indices(
    x: fx.Node,
    x_names: list[str],
    singles: tuple[int, ...],
    stack_shape: Sequence[int],
    stack: list[str],
    out: list[str],
    batch: list[str],
) -> ExpertEinsum | None:
    """None too where an index has one size in x and another in the stack, which broadcasts."""
    sizes = dict(zip(stack, stack_shape, strict=True))
    shared = [(n, sizes[i]) for i, n in _sizes(x, x_names, singles).items() if i in sizes]
    if not same_shape([a for a, _ in shared], [b for _, b in shared]):
        return None
    found = expert_einsum(x_names, stack, out, batch, sizes)
    return None if found is None else replace(found, x_singles=singles)


def _without_singles(
    x: fx.Node, x_names: list[str], weight: fx.Node, weight_names: list[str]
) -> tuple[list[str], tuple[int, ...]]:
    """x without the dimensions of size one that broadcast against the weight's."""
    sizes = dict(zip(weight_names, _shape(weight), strict=True))
    singles = tuple(
        dim
        for dim, (name, size) in enumerate(zip(x_names, _shape(x), strict=True))
        if name in sizes and same_shape([size], [1]) and not same_shape([sizes[name]], [1])
    )
    return [name for dim, name in enumerate(x_names) if dim not in singles], singles


def _sizes(x: fx.Node, names: list[str], singles: tuple[int, ...]) -> dict[str, int]:
    shape = [size for dim, size in enumerate(_shape(x)) if dim not in singles]
    return dict(zip(names, shape, strict=True))


def _ndim(node: object) -> int:
    value = example(node)
    return -1 if value is None else value.dim()


def _shape(node: object) -> tuple[int, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)


_READERS: dict[object, Callable[[fx.Node, IsConstant], ExpertForm | None]] = {
    "_grouped_mm": _grouped_mm,
    "grouped_mm": _grouped_mm,
    "transformers.grouped_mm_fallback": _fallback,
    "transformers.grouped_mm_fallback.default": _fallback,
    operator.matmul: _matmul,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
}
PRODUCTS = frozenset(map(target_name, _READERS))
