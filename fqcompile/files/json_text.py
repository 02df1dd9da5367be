"""Parse untrusted JSON: bounded size and depth, and only printable names.

`checked` converts it to dataclasses, and checks that every field has its type, and exists unless
it has a default.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fqcompile.errors import CheckpointError

LARGEST = 100_000_000  # bytes; the limit that safetensors sets its headers
_DEEPEST, _LONGEST_NAME, _SHOWN = 64, 512, 600
_MOST_CONTAINERS = 2_000_000  # three for each tensor of a header; more take a minute to make


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        CheckpointError: it is not a JSON object, or is absurdly large or deeply nested.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise CheckpointError(
            f"{path} has {size} bytes, and at most {LARGEST} are read; download it again"
        )
    found = parse_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return found


def parse_json(text: str | bytes, where: str, remedy: str = "download it again") -> Any:
    """The value of a text; `where` and `remedy` are for errors.

    Raises:
        CheckpointError: it is not JSON, or has absurdly many or deeply nested lists and objects.
    """
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > _MOST_CONTAINERS:  # type: ignore[arg-type]
        raise CheckpointError(
            f"{where} has more than {_MOST_CONTAINERS} lists and objects; {remedy}"
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); {remedy}") from error
    depth, level = 0, [found] if isinstance(found, dict | list) else []
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise CheckpointError(f"{where} is nested more than {_DEEPEST} deep; {remedy}")
        inside = (v for c in level for v in (c.values() if isinstance(c, dict) else c))
        level = [value for value in inside if isinstance(value, dict | list)]
    return found


def check_name(name: object, where: str) -> None:
    """A name of a tensor, layer or file, which messages and tables print unescaped.

    Raises:
        CheckpointError: it is not a name, is absurdly long, or has control characters.
    """
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            f"{where} has the name {shown(repr(name))}; names are 1 to {_LONGEST_NAME} characters "
            "that can be printed; rename it"
        )


def shown(text: object) -> str:
    """The beginning of an untrusted text, on one line."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[:_SHOWN])
    return line if len(str(text)) <= _SHOWN else f"{line} ..."


T = TypeVar("T")


def checked(kind: type[T], value: Any, where: str) -> T:
    """`value` as a `kind`: a dataclass, a mapping, a tuple, or a plain JSON type.

    Negative numbers are refused.

    Raises:
        CheckpointError: it is not of that kind; the message says where.
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
    known = {field.name: field for field in fields(kind)}
    missing = {n for n, f in known.items() if f.default is f.default_factory is MISSING}
    wrong = (missing - value.keys()) | (value.keys() - known.keys())
    if wrong:
        raise CheckpointError(
            f"{where} lacks or has too many: {shown(sorted(wrong))}; save it again"
        )
    hints = get_type_hints(kind)
    return kind(
        **{name: checked(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    )
