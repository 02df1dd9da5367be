"""2 normalize: one spelling for each call, before any matcher looks at it.

F.linear(input=x, weight=w)       ->   F.linear(x, w, None)
x.__matmul__(w)                   ->   x.matmul(w)
torch.chunk(w, 2, dim=1)          ->   torch.chunk(w, 2, 1)
aten.slice.Tensor(x, 1, 0, 8)     ->   x[:, 0:8]
aten.index.Tensor(x, [ids])       ->   x[ids]
aten.numpy_T(w)                   ->   w.t()
aten._to_copy(x, dtype=d)         ->   x.to(dtype=d, copy=True)
torch.linalg.matmul(x, w)         ->   torch.matmul(x, w)
tensordot(x, w, 1), inner(x, w)   ->   einsum("abc,ce->abe", x, w)
einsum("bk,nk", x, w)             ->   einsum("bk,nk->bn", x, w)
einsum("bk,rk,nr->bn", x, a, w)   ->   einsum("br,nr->bn", einsum("bk,rk->br", x, a), w)

Exported programs hold aten operators, and newer releases of PyTorch emit them for some attributes.
`target_name` is the same for a method, a function and an operator of one name. Arguments of the
calls in SIGNATURES become positional, with defaults filled in; only keyword-only arguments stay
keywords. A call with other arguments, such as `out=`, is not changed.
"""

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from inspect import Parameter, Signature
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.passes.effects import has_effects, in_transforms
from fqcompile.passes.einsum import equation_of, pairs, with_result
from fqcompile.passes.fold import ConstantFolder, Emitter
from fqcompile.passes.products import shape_of
from fqcompile.passes.state import GraphState, example
from fqcompile.torch_compat import OpOverload, schema_of
from fqcompile.weights.composites import COMPOSITES
from fqcompile.weights.recipe import target_name

Call = tuple[object, tuple[Any, ...], dict[str, Any]]


def normalize(state: GraphState) -> int:
    """Rewrite each call to its one spelling, in place; return the number of calls changed."""
    emit, folder = Emitter(state.graph), ConstantFolder(state)
    stay = _of_other_types(state.graph)
    for node in state.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        before, name = (node.target, node.args, node.kwargs), target_name(node.target)
        _by_position(node)
        packet = str(getattr(node.target, "overloadpacket", node.target))
        write = _SPELLINGS.get(packet) or _SPELLINGS.get(name)
        call = None if write is None else write(node)
        if call is not None:
            target, node.args, node.kwargs = call
            node.op = "call_method" if isinstance(target, str) else "call_function"
            node.target = target
        _in_order(node)
        read = node not in stay and any(map(folder.is_constant, node.all_input_nodes))
        if read and _written_out(node, emit.at(node), folder):
            state.matched.append(f"{name}: written out")
            continue
        if (node.target, node.args, node.kwargs) != before:
            state.matched.append(f"{name}: {node.format_node()}")
    for made in emit.made:
        _in_order(made)
    return len(state.matched)


def _by_position(node: fx.Node) -> None:
    """Make keyword arguments of aten operators positional: aten names the first one `self`."""
    if not isinstance(node.target, OpOverload) or not node.kwargs:
        return
    positional = [a.name for a in schema_of(node.target).arguments if not a.kwarg_only]
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in positional[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    node.args, node.kwargs = tuple(args), kwargs


def _of_other_types(graph: fx.Graph) -> Container[fx.Node]:
    """Nodes whose tensors have other types or dtypes than calls of their own would have here."""
    names = [target_name(node.target) for node in graph.nodes]
    return set(graph.nodes) if "_enter_autocast" in names else in_transforms(graph)


def _written_out(node: fx.Node, emit: Emitter, folder: ConstantFolder) -> bool:
    """Replace a call that reads several weights by calls that read one; whether that was done."""
    write = COMPOSITES.get(target_name(node.target))
    several = target_name(node.target) == "einsum" and len(node.args) > 3
    if not (write or several) or has_effects(node):
        return False
    one = isinstance(node.meta.get("example_value"), Tensor)
    users = [node] if one else list(node.users)
    known = all(example(value) is not None for value in (*node.all_input_nodes, *users))
    if not known:
        return False
    replaced: dict[fx.Node, Any] = {user: 0 if one else user.args[1] for user in users}
    if write is None:
        results = _in_pairs(node, emit, folder)
    else:
        results = emit.inline(write, *node.args, **node.kwargs)
    if results is NotImplemented:
        return False
    results = results if isinstance(results, tuple) else (results,)
    for old, at in replaced.items():
        wanted = old.meta["example_value"]
        old.replace_all_uses_with(emit.laid_out(emit.cast(results[at], wanted), wanted))
    for old in {**replaced, node: 0}:
        node.graph.erase_node(old)
    return True


def _in_order(node: fx.Node) -> None:
    signature = SIGNATURES.get(target_name(node.target))
    if signature is None:
        return
    try:
        call = signature.bind(*node.args, **node.kwargs)
    except TypeError:  # another overload, which no matcher reads
        return
    call.apply_defaults()
    node.args, node.kwargs = call.args, call.kwargs


def _signature(names: str, defaults: Mapping[str, Any] | None = None, **keywords: Any) -> Signature:
    """A signature of arguments without defaults, with defaults, and keyword-only ones."""
    either, keyword = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    ordered = dict.fromkeys(names.split(), Parameter.empty) | dict(defaults or {})
    return Signature(
        [Parameter(name, either, default=value) for name, value in ordered.items()]
        + [Parameter(name, keyword, default=value) for name, value in keywords.items()]
    )


_CONVOLUTION = _signature(
    "input weight", {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
)
_NO_OFFSETS = {"offs": None, "bias": None, "out_dtype": None}
SIGNATURES = {
    "linear": _signature("input weight", {"bias": None}),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _CONVOLUTION),
    "matmul": _signature("input other"),
    "mm": _signature("input mat2"),
    "mv": _signature("input vec"),
    "bmm": _signature("input mat2"),
    "addmm": _signature("input mat1 mat2", beta=1, alpha=1),
    "addmv": _signature("input mat vec", beta=1, alpha=1),
    "baddbmm": _signature("input batch1 batch2", beta=1, alpha=1),
    "_grouped_mm": _signature("input mat2", _NO_OFFSETS),
    "grouped_mm": _signature("mat_a mat_b", **_NO_OFFSETS),
    "transformers.grouped_mm_fallback": _signature("input weight offs"),
    "scaled_dot_product_attention": _signature(
        "query key value",
        {"attn_mask": None, "dropout_p": 0.0, "is_causal": False},
        scale=None,
        enable_gqa=False,
    ),
    "index_select": _signature("input dim index"),
    "narrow": _signature("input dim start length"),
    "transpose": _signature("input dim0 dim1"),
    "chunk": _signature("input chunks", {"dim": 0}),
    "split": _signature("tensor split_size_or_sections", {"dim": 0}),
}


def _method(name: str) -> Callable[[fx.Node], Call]:
    """A rewrite to the tensor method `name` with the same arguments."""
    return lambda node: (name, node.args, dict(node.kwargs))


def _function(function: object) -> Callable[[fx.Node], Call]:
    """A rewrite to the function with the same arguments."""
    return lambda node: (function, node.args, dict(node.kwargs))


def _numpy_t(node: fx.Node) -> Call | None:
    value = example(node.args[0])
    return ("t", node.args, {}) if value is not None and value.dim() <= 2 else None


def _slice(node: fx.Node) -> Call | None:
    given: tuple[Any, ...] = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    x, dim, start, end, step = given
    value = example(x)
    if value is None or not isinstance(dim, int):
        return None
    whole = (slice(None),) * (dim % value.dim())
    return operator.getitem, (x, (*whole, slice(start, end, None if step == 1 else step))), {}


def _index(node: fx.Node) -> Call | None:
    x, indices = node.args
    if not isinstance(indices, list | tuple):
        return None
    parts = tuple(slice(None) if part is None else part for part in indices)
    return operator.getitem, (x, parts[0] if len(parts) == 1 else parts), {}


def _to_copy(node: fx.Node) -> Call | None:
    given = {name: value for name, value in node.kwargs.items() if value is not None}
    given = {name: value for name, value in given.items() if (name, value) != _STRIDED}
    known = given.keys() <= {"dtype", "device", "non_blocking", "memory_format"}
    return ("to", node.args, {**given, "copy": True}) if known else None


def _convolution(node: fx.Node) -> Call | None:
    """Where it is not transposed, the function for this number of dimensions."""
    match node.args:
        case (x, w, bias, stride, padding, dilation, False, _, groups) if not node.kwargs:
            named = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}.get(len(shape_of(w)))
            return named and (named, (x, w, bias, stride, padding, dilation, groups), {})
    return None


def _linalg_matmul(node: fx.Node) -> Call | None:
    return (torch.matmul, node.args, {}) if len(node.args) == 2 and not node.kwargs else None


def _inner(node: fx.Node) -> Call | None:
    match node.args:
        case (x, w) if not node.kwargs:
            return _contracted(x, w, [-1], [-1])
    return None


def _tensordot(node: fx.Node) -> Call | None:
    """The dimensions are a number, the last ones of x and the first ones of w, or two lists."""
    match (*node.args, *node.kwargs.values()):
        case (x, w, int() as count) if node.kwargs.keys() <= {"dims"}:
            return _contracted(x, w, list(range(-count, 0)), list(range(count)))
        case (x, w, [[*left], [*right]]) | (x, w, [*left], [*right]) if "out" not in node.kwargs:
            return _contracted(x, w, left, right)
    return None


def _contracted(x: Any, w: Any, left: Sequence[Any], right: Sequence[Any]) -> Call | None:
    """The einsum that sums over pairs of dimensions of two tensors, and keeps the others."""
    ndims = [len(shape_of(x)), len(shape_of(w))]
    if 0 in ndims or sum(ndims) > len(ascii_lowercase):
        return None
    names = ascii_lowercase[: sum(ndims)]
    ours, theirs = names[: ndims[0]], list(names[ndims[0] :])
    for a, b in zip(left, right, strict=True):
        theirs[b] = ours[a]
    out = "".join(i for i in (*ours, *theirs) if (i in ours) != (i in theirs))
    return torch.einsum, (f"{ours},{''.join(theirs)}->{out}", x, w), {}


def _einsum(node: fx.Node) -> Call | None:
    """With the equation as text, its result named, and the operands not in a list."""
    given: Any = node.args
    match given:
        case (str() as equation, [*operands]) | (str() as equation, *operands):
            pass
        case (fx.Node(), [*_], *_):  # x, [0, 1], w, [2, 1], [0, 2]
            operands = list(given[: len(given) // 2 * 2 : 2])
            equation = equation_of(given[1::2], given[-1] if len(given) % 2 else None)
        case _:
            return None
    return None if node.kwargs else (torch.einsum, (with_result(equation), *operands), {})


def _in_pairs(node: fx.Node, emit: Emitter, folder: ConstantFolder) -> Any:
    """Multiply constants and activations two at a time, so that each weight has its product."""
    equation, *operands = node.args
    constant = [folder.is_constant(one) for one in operands]
    for pair in pairs(str(equation), [len(shape_of(one)) for one in operands], constant):
        second, first = operands.pop(pair.second), operands.pop(pair.first)
        operands.insert(pair.first, emit(torch.einsum, pair.equation, first, second))
    return operands[0] if len(operands) == 1 else NotImplemented


_STRIDED = ("layout", torch.strided)
_SPELLINGS: dict[str, Callable[[fx.Node], Call | None]] = {
    "aten.numpy_T": _numpy_t,
    "aten.matrix_H": _method("adjoint"),
    "aten.mH": _method("adjoint"),
    "aten._unsafe_view": _method("reshape"),
    "aten.split_with_sizes": _method("split"),
    "aten.unsafe_split": _method("split"),
    "aten.slice": _slice,
    "aten.index": _index,
    "aten._to_copy": _to_copy,
    "prims.convert_element_type": _method("to"),
    "__matmul__": _method("matmul"),
    "__getitem__": lambda node: (operator.getitem, node.args, dict(node.kwargs)),
    "swapaxes": _method("transpose"),
    "swapdims": _method("transpose"),
    "aten.conv1d": _function(torch.conv1d),  # the operator takes no number for a list of one
    "aten.conv2d": _function(torch.conv2d),
    "aten.conv3d": _function(torch.conv3d),
    "aten.convolution": _convolution,
    "linalg_matmul": _linalg_matmul,
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
}
