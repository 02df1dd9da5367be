"""One spelling for each call: aten operators as a model's own code writes the same thing.

Exported programs hold aten operators, and so does what newer releases of PyTorch write for some
attributes. Where name and arguments agree with those of torch, `target_name` says the same of
both, and the call stays as it is; what is spelled otherwise is written anew:

aten.slice.Tensor(x, 1, 0, 8)     ->   x[:, 0:8]
aten.index.Tensor(x, [ids])       ->   x[ids]
aten.numpy_T(w)                   ->   w.t()
aten.matrix_H(w), aten.mH         ->   w.adjoint()
aten._unsafe_view(x, size)        ->   x.reshape(size)
aten._to_copy(x, dtype=d)         ->   x.to(dtype=d, copy=True)
aten.split_with_sizes(x, sizes)   ->   x.split(sizes)
prims.convert_element_type(x, d)  ->   x.to(d)
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fqcompile.passes.base import example
from fqcompile.torch_compat import OpOverload, OpOverloadPacket, schema_of

_OPERATOR = OpOverload | OpOverloadPacket
Call = tuple[object, tuple[Any, ...], dict[str, Any]]


def spell(graph: fx.Graph) -> None:
    """Write every call as torch spells it, in place; what is computed stays the same."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, _OPERATOR):
            continue
        _by_position(node)
        write = _SPELLINGS.get(str(getattr(node.target, "overloadpacket", node.target)))
        call = None if write is None else write(node)
        if call is not None:
            target, node.args, node.kwargs = call
            node.op = "call_method" if isinstance(target, str) else "call_function"
            node.target = target


def _by_position(node: fx.Node) -> None:
    """Arguments that the schema takes by position, from names: aten calls the first one `self`."""
    if not isinstance(node.target, OpOverload) or not node.kwargs:
        return
    positional = [a.name for a in schema_of(node.target).arguments if not a.kwarg_only]
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in positional[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    node.args, node.kwargs = tuple(args), kwargs


def _method(name: str) -> Callable[[fx.Node], Call]:
    """The tensor method of the same arguments."""
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
}
