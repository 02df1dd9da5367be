"""The nodes that stand for quantized matmuls: which they are, and their arguments by name."""

from typing import Any

from torch import fx

from fqcompile.kernels.op import matmul, matmul_inference
from fqcompile.torch_compat import schema_of

MATMUL, INFERENCE = matmul, matmul_inference  # the second where no gradient can flow
_DEFAULTS = {argument.name: argument.default_value for argument in schema_of(matmul).arguments}


def is_quantized(node: object) -> bool:
    """Whether the node is a call of the operator, for one matrix or for experts."""
    return isinstance(node, fx.Node) and node.target in (MATMUL, INFERENCE)


def is_linear(node: object) -> bool:
    """Whether it is a call for one matrix."""
    return is_quantized(node) and argument(node, "routing") is None  # type: ignore[arg-type]


def argument(node: fx.Node, name: str) -> Any:
    """An argument by its schema name; `routing` is the offsets or ids of experts."""
    given = _arguments(node)
    if name == "routing":
        return given["ids"] if given["offsets"] is None else given["offsets"]
    return given[name]


def changed(node: fx.Node, **changes: Any) -> tuple[Any, tuple[Any, ...]]:
    """(operator, arguments) of a node with some arguments changed."""
    return node.target, matmul_arguments(*node.args, **changes)


def matmul_arguments(*given: Any, **named: Any) -> tuple[Any, ...]:
    """All by position, as the nodes have them, without defaults at the end."""
    unknown = named.keys() - _DEFAULTS.keys()
    assert not unknown, f"the operator has no {unknown}"
    values = list((_DEFAULTS | dict(zip(_DEFAULTS, given, strict=False)) | named).values())
    for default in reversed(_DEFAULTS.values()):
        if values[-1] is not default:
            break
        values.pop()
    return tuple(values)


def _arguments(node: fx.Node) -> dict[str, Any]:
    return _DEFAULTS | dict(zip(_DEFAULTS, node.args, strict=False))
