"""The nodes that stand for quantised matmuls: which they are, and their arguments by name."""

from typing import Any

import torch
from torch import fx

from fqcompile.kernels import expert_ops as _expert_ops  # noqa: F401  (defines the operators)
from fqcompile.kernels import ops as _ops  # noqa: F401
from fqcompile.torch_compat import schema_of

_fqcompile = torch.ops.fqcompile
LINEAR = _fqcompile.linear.default
GROUPED = _fqcompile.grouped_linear.default
GATHERED = _fqcompile.gathered_linear.default
# What graphs call where no gradient can flow.
INFERENCE = {
    LINEAR: _fqcompile.linear.inference,
    GROUPED: _fqcompile.grouped_linear.inference,
    GATHERED: _fqcompile.gathered_linear.inference,
}
_TRAINING: dict[Any, Any] = {inference: default for default, inference in INFERENCE.items()}
_OPS = INFERENCE.keys() | _TRAINING.keys()
_NAMES: dict[Any, tuple[str, ...]] = {
    op: tuple(argument.name for argument in schema_of(op).arguments) for op in _OPS
}


def is_quantized(node: object) -> bool:
    """Whether the node is a call of one of the operators, for one matrix or for experts."""
    return isinstance(node, fx.Node) and node.target in _OPS


def is_linear(node: object) -> bool:
    """Whether it is the operator for one matrix."""
    return is_quantized(node) and training_op(node) is LINEAR  # type: ignore[arg-type]


def training_op(node: fx.Node) -> Any:
    """The node's operator in the form that has a backward."""
    return _TRAINING.get(node.target, node.target)


def argument(node: fx.Node, name: str) -> Any:
    """An argument by its schema name; None where the operator has no such argument.

    All are positional. `routing` is the offsets or ids of experts.
    """
    names = _NAMES[node.target]
    if name == "routing":
        return None if training_op(node) is LINEAR else node.args[3]
    return node.args[names.index(name)] if name in names else None


def changed(node: fx.Node, **changes: Any) -> tuple[Any, tuple[Any, ...]]:
    """(operator, arguments) of a node with some arguments changed."""
    names = _NAMES[node.target]
    unknown = changes.keys() - set(names)
    assert not unknown, f"{node.target} has no {unknown}"
    values = zip(names, node.args, strict=True)
    return node.target, tuple(changes.get(name, value) for name, value in values)
