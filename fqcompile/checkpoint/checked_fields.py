"""Dataclasses from JSON that somebody may have changed: each field is there and has its type."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fqcompile.errors import CheckpointError
from fqcompile.files.json_text import shown

T = TypeVar("T")


def checked(kind: type[T], value: Any, where: str) -> T:
    """`value` as a `kind`: a dataclass, a mapping, a tuple, or what JSON itself has.

    Numbers are never negative.

    Raises:
        CheckpointError: it is not; the message says where.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(origin):
        return _dataclass(kind, _of_type(dict, value, where), where)  # type: ignore[no-any-return]
    if origin is Mapping:
        items = _of_type(dict, value, where).items()
        return {k: checked(arguments[1], v, f"{where}.{shown(k)}") for k, v in items}  # type: ignore[return-value]
    if origin is tuple:
        found = enumerate(_of_type(list, value, where))
        return tuple(checked(arguments[0], v, f"{where}[{i}]") for i, v in found)  # type: ignore[return-value]
    if kind is Any:
        return value  # type: ignore[no-any-return]
    result = _of_type(kind, value, where)
    if isinstance(result, int) and result < 0:
        raise CheckpointError(
            f"{where} is {shown(result)}, which is negative; save the model again"
        )
    return result


def _of_type(kind: type[T], value: Any, where: str) -> T:
    if type(value) is not kind:  # a bool is no number here
        raise CheckpointError(
            f"{where} is {type(value).__name__}, not {kind.__name__}; save the model again"
        )
    return value


def _dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    names = [field.name for field in fields(kind)]
    wrong = set(names) ^ value.keys()
    if wrong:
        raise CheckpointError(
            f"{where} lacks or has too many: {shown(sorted(wrong))}; save it again"
        )
    hints = get_type_hints(kind)
    return kind(**{name: checked(hints[name], value[name], f"{where}.{name}") for name in names})
