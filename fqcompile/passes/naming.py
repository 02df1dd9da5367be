"""Names of a graph's constant inputs, as in `named_parameters()` of the module that was compiled.

Dynamo names an input by its path from the captured frame. After a graph break that frame may be
anywhere inside the model, and a path such as L['___stack0']._parameters['weight'] does not tell
where. So weights are looked up by identity in the modules on the call stack: the compiled module or
function, and the modules between it and the frame. A tensor that no module holds is named by its
path.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import CellType, MethodType
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from fqcompile.config import HEAD_NAMES
from fqcompile.distributed.shards import local_part
from fqcompile.torch_compat import OptimizeContext, Source, plain_module, source_of, wrap_inline

Input = TypeVar("Input", fx.Node, int)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# `_local_tensor` is a sharded parameter's local part, which `localize` made an input.
_CONTAINERS = ("_modules", "_parameters", "_buffers", "__dict__", "_local_tensor")


@dataclass(frozen=True)
class InputName:
    """What a constant input is called.

    Attributes:
        name: its name; if several modules share it, the one in the linear that multiplies with it.
        table: its name in the module that reads its rows; equal to `name` if no other shares it.
        embedded: whether an embedding module has it.
        held: whether it was found in a module; if not, `name` is Dynamo's path.
        moved: whether the graph began elsewhere than at the module that names it, so that it may
            run for a sibling with weights of other names.
    """

    name: str
    table: str
    embedded: bool = False
    held: bool = True
    moved: bool = False

    @property
    def of_head(self) -> bool:
        return self.embedded or HEAD_NAMES.search(self.name) is not None


@dataclass(frozen=True, eq=False)
class Holder:
    """A module that holds a tensor, and where: `attribute` is a path if it is in a list or dict.

    `name` is the qualified name in the root module.
    """

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor

    @property
    def embeds(self) -> bool:
        return isinstance(self.module, EMBEDDINGS)

    @property
    def multiplies(self) -> bool:
        return isinstance(self.module, nn.Linear)


def holders_of(model: nn.Module) -> dict[int, list[Holder]]:
    """{id of a parameter, buffer or tensor attribute: its holders, in order}.

    A sharded tensor is also found by the id of its local part.
    """
    found: dict[int, list[Holder]] = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in _tensors(module):
            name = f"{prefix}.{attribute}" if prefix else attribute
            places = found.setdefault(id(tensor), [])
            places.append(Holder(name, module, attribute, tensor))
            found[id(local_part(tensor))] = places
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
    for attribute, value in vars(module).items():
        if isinstance(value, Tensor):
            yield attribute, value
        elif isinstance(value, list | tuple | dict) and attribute not in _CONTAINERS:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{attribute}.{key}", v) for key, v in items if isinstance(v, Tensor))


def name_inputs(nodes: Mapping[fx.Node, int], args: Sequence[Any]) -> dict[fx.Node, InputName]:
    """The names of these inputs, whose values in this call are `args[index]`.

    Names that would be equal get the root in front, as a.weight and b.weight of a function that
    calls two modules a and b.
    """
    holders: dict[int, tuple[str, list[Holder]]] = {}
    for root, module in _compiled_modules():
        for key, places in holders_of(module).items():
            holders.setdefault(key, (root, places))
    used = Counter({id(places): _first(places).name for _, places in holders.values()}.values())
    paths = {node: _path(node) for node in nodes}
    free = {tuple(p): _relative(p) for n, p in paths.items() if id(args[nodes[n]]) not in holders}
    used.update(free.values())
    named = {}
    for node, path in paths.items():
        root, places = holders.get(id(args[nodes[node]]), (path[0], []))
        known = _named(places, _relative(path))
        if used[known.name] > 1:
            known = _below(root, known) if places else _named((), ".".join(path))
        named[node] = known
    return named


def joined_name(known: Mapping[Input, InputName], sources: Sequence[Input]) -> str:
    """The name of a tensor that is computed from these inputs: q.weight+k.weight."""
    return "+".join(dict.fromkeys(known[source].name for source in sources))


def _named(places: Sequence[Holder], path: str) -> InputName:
    if not places:
        return InputName(path, path, held=False)
    first = _first(places)
    return InputName(
        name=first.name,
        table=next((place for place in places if not place.multiplies), first).name,
        embedded=any(place.embeds for place in places),
        moved=path not in [place.name for place in places],
    )


def _first(places: Sequence[Holder]) -> Holder:
    """The holder that names a shared tensor: linears first, embeddings last."""
    return min(places, key=lambda place: (not place.multiplies, place.embeds))


def _below(root: str, known: InputName) -> InputName:
    prefix = f"{root}." if root else ""
    return replace(known, name=prefix + known.name, table=prefix + known.table)


def qualified_name(node: fx.Node) -> str:
    """The name of an input by Dynamo's path from the captured frame."""
    return _relative(_path(node))


def _relative(path: Sequence[str]) -> str:
    """The path without its root, unless the root is the tensor itself."""
    return ".".join(path[1:]) or path[0]


def _path(node: fx.Node) -> list[str]:
    return _path_of(source_of(node), node.name)


def _path_of(source: Any, default: str) -> list[str]:
    """["self", "layer", "weight"] of L['self'].__dict__['_modules']['layer']._parameters['weight'].

    It is read from the parts of the source, not its text: names may contain any character.
    """
    parts: list[str] = []
    while source is not None:
        named = [getattr(source, field, None) for field in _FIELDS]
        # the key of a dict may be a source of its own
        parts += [
            str(getattr(p, "index", "")) if isinstance(p, Source) else str(p)
            for p in named
            if p is not None
        ]
        source = getattr(source, "base", None)
    return [part for part in reversed(parts) if part not in _CONTAINERS] or [default]


# Attributes in which a source of Dynamo keeps its own part of the path.
_FIELDS = ("member", "index", "local_name", "global_name")


def _compiled_modules() -> Iterator[tuple[str, nn.Module]]:
    """The modules of the running call, outermost first, each with a name.

    First the module that was given to torch.compile, or the modules that the given function can
    reach; then the modules whose methods it has called, found on the call stack.
    """
    inner: list[nn.Module] = []
    # Not this frame: its f_locals would refer to themselves and keep the stack alive.
    frame = sys._getframe().f_back
    while frame is not None:
        values = frame.f_locals
        owner = values.get("self")
        if isinstance(owner, OptimizeContext) and "fn" in values:
            yield from _modules_of(values["fn"], values.get("args", ()), values.get("kwargs", {}))
            break
        if isinstance(owner, nn.Module):
            inner.append(owner)
        frame = frame.f_back
    yield from (("", plain_module(module)) for module in reversed(inner))


def begin_token() -> int | None:
    """The begin token of the module whose call runs, the outermost that has one."""
    tokens = (begin_token_of(module) for _, module in _compiled_modules())
    return next((token for token in tokens if token is not None), None)


def begin_token_of(model: nn.Module) -> int | None:
    """The id that sequences of tokens begin with: the first `bos_token_id` in its modules' configs.

    Of a config with several parts, as transformers has them, that of the text.
    """
    for module in model.modules():
        config: Any = vars(module).get("config")
        token: Any = None
        with suppress(AttributeError, TypeError, ValueError):  # no such config, or several texts
            config = config.get_text_config()
        with suppress(AttributeError, LookupError):
            token = config.bos_token_id
        token = token[0] if isinstance(token, list | tuple) and token else token
        if isinstance(token, int):
            return token
    return None


def _modules_of(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Module]]:
    """The module to which the function belongs; else the modules it can reach, with names."""
    function, args, kwargs = _unwrapped(function, args, kwargs)
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        yield "", plain_module(owner)
        return
    reached = {**_variables(function, args), **kwargs}
    reached |= getattr(args[0] if args else None, "__dict__", {})
    for name, value in reached.items():
        module = value.__self__ if isinstance(value, MethodType) else value
        if isinstance(module, nn.Module):
            yield name, plain_module(module)


def _unwrapped(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    """The function, module or method behind partials and callable objects."""
    while not isinstance(function, nn.Module):
        call = getattr(function, "__call__", None)  # noqa: B004  what it calls is asked for
        if isinstance(function, partial):
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        elif isinstance(function, MethodType):
            if isinstance(function.__self__, nn.Module):
                break
            function, args = function.__func__, (function.__self__, *args)
        elif isinstance(call, MethodType):
            function = call
        elif getattr(function, "__code__", None) in wrap_inline.__code__.co_consts:
            function = function.__wrapped__  # Dynamo's wrapper around a callable object
        else:
            break
    return function, args, kwargs


def _variables(function: Any, args: Sequence[Any]) -> dict[str, Any]:
    """Objects that a Python function can reach: arguments, closure, globals."""
    if not inspect.isfunction(function):
        return {str(index): arg for index, arg in enumerate(args)}
    code = function.__code__
    found = dict(zip(code.co_varnames, args, strict=False))
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if cell != CellType():  # an empty cell has no contents
            found[name] = cell.cell_contents
    globals_ = function.__globals__
    return found | {name: globals_[name] for name in code.co_names if name in globals_}


_TABLE = "_fqcompile_table"  # attribute of a tensor


def note_table(weight: Tensor) -> None:
    """Record that a graph reads rows of the weight, for other graphs that only multiply with it."""
    vars(weight)[_TABLE] = True


def is_table(weight: Tensor) -> bool:
    return _TABLE in vars(weight)
