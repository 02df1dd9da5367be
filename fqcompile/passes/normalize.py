"""2 normalize: one spelling for each call, before any matcher looks at it.

F.linear(input=x, weight=w)       ->   F.linear(x, w, None)
x.__matmul__(w)                   ->   x.matmul(w)
torch.chunk(w, 2, dim=1)          ->   torch.chunk(w, 2, 1)
aten.slice.Tensor(x, 1, 0, 8)     ->   x[:, 0:8]
aten.index.Tensor(x, [ids])       ->   x[ids]
aten.numpy_T(w)                   ->   w.t()
aten._to_copy(x, dtype=d)         ->   x.to(dtype=d, copy=True)

Exported programs hold aten operators, and newer releases of PyTorch emit them for some attributes.
`target_name` is the same for a method, a function and an operator of one name. Arguments of the
calls in SIGNATURES become positional, with defaults filled in; only keyword-only arguments stay
keywords. A call with other arguments, such as `out=`, is not changed.
"""

import operator
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import fx

from fqcompile.passes.state import GraphState, example
from fqcompile.torch_compat import OpOverload, schema_of
from fqcompile.weights.recipe import target_name

Call = tuple[object, tuple[Any, ...], dict[str, Any]]


def normalize(state: GraphState) -> int:
    """Rewrite each call to its one spelling, in place; return the number of calls changed."""
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
        if (node.target, node.args, node.kwargs) != before:
            state.matched.append(f"{name}: {node.format_node()}")
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


_NO_OFFSETS = {"offs": None, "bias": None, "out_dtype": None}
SIGNATURES = {
    "linear": _signature("input weight", {"bias": None}),
    "matmul": _signature("input other"),
    "mm": _signature("input mat2"),
    "mv": _signature("input vec"),
    "bmm": _signature("input mat2"),
    "addmm": _signature("input mat1 mat2", beta=1, alpha=1),
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


def _einsum(node: fx.Node) -> Call | None:
    """Einsum with two operands as arguments of their own, not in a list."""
    match node.args:
        case (equation, [left, right]) if not node.kwargs:
            return torch.einsum, (equation, left, right), {}
    return None


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
    "einsum": _einsum,
}
