"""Side effects: find the nodes that a rewrite must not move a read across."""

import inspect
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.torch_compat import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    memory_id,
    schema_of,
    tree_map_only,
)

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and hasattr(operator, name[1:])
) | {operator.setitem, operator.delitem}
_INPLACE_METHODS = frozenset(f"__{f.__name__}__" for f in _INPLACE_OPERATORS)
# Functions that change the mode in which later nodes run.
_MODE_SWITCHES = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)
# Functions that enter and leave a transform of torch.func or a level of forward-mode AD.
_ENTERS = ("_increment_nesting", "_enter_dual_level")
_LEAVES = ("_decrement_nesting", "_exit_dual_level")
_NESTING = (*_ENTERS, *_LEAVES)
_KNOWN_PACKAGES = ("torch", "_operator", "math", "builtins")


def _inplace_name(name: str) -> bool:
    if name.startswith("__"):
        return name in _INPLACE_METHODS
    return name.endswith("_")


def _asks_inplace(node: fx.Node) -> bool:
    """Whether the call has `inplace=True` or an embedding's `max_norm`, by keyword or position."""
    named = dict(node.kwargs)
    if inspect.isfunction(node.target):
        parameters = list(inspect.signature(node.target).parameters)
        named |= dict(zip(parameters, node.args, strict=False))
    return bool(named.get("inplace")) or named.get("max_norm") is not None


def _written(overload: OpOverload) -> list[Any]:
    """The arguments that the operator writes to according to its schema."""
    arguments = schema_of(overload).arguments
    return [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def has_effects(node: fx.Node) -> bool:
    """Whether the node may write to a tensor that others see, or switches a mode.

    Follows PyTorch's naming (`add_`, `out=`, `inplace=True`) and operator schemas. Anything unknown
    (higher-order operators, Triton kernels, user functions) counts as having effects.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        return _inplace_name(str(node.target))
    target = node.target
    if node.op != "call_function" or isinstance(target, HigherOrderOperator):
        return True
    if isinstance(target, OpOverload):
        return bool(schema_of(target).is_mutable)
    if target in _INPLACE_OPERATORS or node.kwargs.get("out") is not None or _asks_inplace(node):
        return True
    if isinstance(target, OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
        # `out=` arguments were not given: that was checked above
        return any(not a.is_out for overload in overloads for a in _written(overload))
    package = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    name = getattr(target, "__name__", "")
    if package not in _KNOWN_PACKAGES or name in _MODE_SWITCHES or name.endswith(_NESTING):
        return True
    return package == "torch" and _inplace_name(name)


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node with effects may write to.

    For an in-place call the first one; for an operator, those its schema names; for a higher-order
    operator, none if no body writes to an input; otherwise all.
    """
    if node.op == "call_method" or node.target in _INPLACE_OPERATORS:
        return [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if isinstance(node.target, OpOverload):
        names = [a.name for a in schema_of(node.target).arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        found: list[fx.Node] = []
        tree_map_only(fx.Node, found.append, [given.get(a.name) for a in _written(node.target)])
        return found
    inner = bodies(node)
    return [] if inner and not any(map(_writes_to_inputs, inner.values())) else node.all_input_nodes


def bodies(node: fx.Node) -> dict[fx.Node, fx.Graph]:
    """{node that names a body: graph of the body} of a higher-order operator."""
    owner = node.graph.owning_module
    if not isinstance(node.target, HigherOrderOperator) or owner is None:
        return {}
    modules = dict(owner.named_modules(remove_duplicate=False))
    named = {arg: modules.get(str(arg.target)) for arg in node.all_input_nodes}
    return {
        arg: module.graph for arg, module in named.items() if isinstance(module, fx.GraphModule)
    }


def _writes_to_inputs(body: fx.Graph) -> bool:
    memory = {node: memory_of(node.meta.get("example_value")) or node for node in body.nodes}
    inputs = {memory[node] for node in body.nodes if node.op == "placeholder"}
    writers = [node for node in body.nodes if has_effects(node)]
    return any(memory[arg] in inputs for node in writers for arg in written_inputs(node))


def memory_of(value: object) -> int | None:
    """An id of a tensor's storage, which views share; None if there is no single one."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    try:
        return int(memory_id(value))
    except RuntimeError:  # a tensor inside a torch.func transform
        return None


def in_transforms(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes between entering and leaving torch.func transforms, with the innermost's name."""
    inside: dict[fx.Node, str] = {}
    entered: list[str] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name.endswith(_ENTERS):
            entered.append(name.removesuffix(_ENTERS[0]).strip("_"))
        elif name.endswith(_LEAVES):
            entered.pop()
        elif entered:
            inside[node] = entered[-1]
    return inside


def effects_between(first: fx.Node, last: fx.Node, but: Collection[fx.Node] = ()) -> bool:
    """Whether a node strictly between the two (in graph order), `but` these, has effects."""
    node = first.next
    while node is not last:
        if node.op == "root":
            raise AssertionError(f"{last} does not come after {first}")
        if node not in but and has_effects(node):
            return True
        node = node.next
    return False
