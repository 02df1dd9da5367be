"""JSON and regular expressions that others wrote: read in bounded time and memory.

JSON has a bounded size and depth, and only printable names; `checked` converts it to dataclasses
and checks that every field has its type, and exists unless it has a default.

Patterns match as by `re.match`. Most are passed to `re`; those that could make it backtrack too
much (nested repeats, several repeats in a row) are matched without backtracking: part by part, as a
set of reachable positions.

    (a+)+b on "aaac":   {0}  -(a+)+->  {1, 2, 3}  -b->  {}
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache, partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fqcompile.errors import CheckpointError

LARGEST = 100_000_000  # bytes; the limit that safetensors sets its headers
_DEEPEST, _LONGEST_NAME, _SHOWN = 64, 512, 600
_MOST_CONTAINERS = 2_000_000  # three for each tensor of a header; more take a minute to make
_parser, _compiler = import_module("re._parser"), import_module("re._compiler")

LONGEST_PATTERN = 1 << 16
# What `re` may try for a name of a usual length, and how many steps a name may take without it.
_FEW_WAYS, _USUAL_LENGTH, _MOST_STEPS = 1 << 16, 64, 1 << 18
_TOO_MANY = _FEW_WAYS + 1
_REPEATS_REMEDY = "write it without repeats inside repeats"


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
    needed = {n for n, f in known.items() if f.default is f.default_factory is MISSING}
    wrong = (needed - value.keys()) | (value.keys() - known.keys())
    if wrong:
        raise CheckpointError(
            f"{where} lacks or has too many: {shown(sorted(wrong))}; save it again"
        )
    hints = get_type_hints(kind)
    return kind(**{n: checked(hints[n], item, f"{where}.{n}") for n, item in value.items()})


@dataclass
class _Search:
    pattern: str
    text: str
    steps: int = _MOST_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise CheckpointError(
                f"the pattern {shown(repr(self.pattern))} takes more than {_MOST_STEPS} steps on "
                f"{shown(self.text)}; {_REPEATS_REMEDY}"
            )


# From the positions reached before a part of the pattern to those after it.
_Part = Callable[[_Search, set[int]], set[int]]


def check_pattern(pattern: str, where: str) -> None:
    """Check that `matches_pattern` accepts the pattern.

    Raises:
        CheckpointError: it is not a regular expression, is absurdly long, or has parts that cannot
            be matched in bounded time.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise CheckpointError(
            f"{where} is a pattern of {len(pattern)} characters; at most {LONGEST_PATTERN} are read"
        )
    try:
        _matcher(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is {shown(repr(pattern))}, which is not a regular expression: {error}"
        ) from error
    except NotImplementedError as error:
        raise CheckpointError(
            f"{where} is {shown(repr(pattern))}, which cannot be matched in bounded time: it has "
            f"{error}; {_REPEATS_REMEDY}"
        ) from error


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether the pattern matches the beginning of the name.

    Raises:
        CheckpointError: that would take unbounded time.
    """
    return _matcher(pattern)(name)


@lru_cache(maxsize=1 << 14)
def _matcher(pattern: str) -> Callable[[str], bool]:
    compiled, tree = re.compile(pattern), _parser.parse(pattern)
    if _ways(tree) <= _FEW_WAYS:
        return lambda name: compiled.match(name) is not None
    whole = _sequence(tree, tree.state)
    return lambda name: bool(whole(_Search(pattern, name), {0}))


def _ways(items: Any) -> int:
    """At most so many ways to match these in a name of the usual length, as far as it matters."""
    return min(_TOO_MANY, prod(_ways_of(str(op), argument) for op, argument in items))


def _ways_of(op: str, argument: Any) -> int:
    if op == "SUBPATTERN":
        return _ways(argument[-1])
    if op == "BRANCH":
        words = [tuple(map(str, choice)) for choice in argument[1]]
        literal = all(item.startswith("(LITERAL") for word in words for item in word)
        if literal and len(set(words)) == len(words):
            return len({len(word) for word in words})  # of one length at most one is there
        return sum(map(_ways, argument[1]))
    if op in ("ASSERT", "ASSERT_NOT"):
        return _ways(argument[1])
    if op.endswith("_REPEAT"):
        low, high, body = argument
        ways, most = _ways(body), min(high, _USUAL_LENGTH)
        if high <= 1:
            return 1 + ways
        if low == high:
            return int(ways**most)
        return most + 1 if ways == 1 else _TOO_MANY
    return _TOO_MANY if "GROUP" in op else 1


def _sequence(items: Any, state: Any) -> _Part:
    parts = [_part(str(op), argument, item, state) for item in items for op, argument in (item,)]

    def run(search: _Search, starts: set[int]) -> set[int]:
        for part in parts:
            starts = part(search, starts)
        return starts

    return run


def _part(op: str, argument: Any, item: Any, state: Any) -> _Part:
    if op == "SUBPATTERN" and not any(argument[1:3]):
        return _sequence(argument[3], state)
    if op == "BRANCH":
        return partial(_branch, [_sequence(choice, state) for choice in argument[1]])
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, body = argument
        return partial(_repeat, low, high, _sequence(body, state))
    if op in ("ASSERT", "ASSERT_NOT") and argument[0] > 0:
        return partial(_look, op == "ASSERT", _sequence(argument[1], state))
    if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
        return partial(_single, _compiler.compile(_parser.SubPattern(state, [item])))
    raise NotImplementedError(op.lower())


def _single(compiled: re.Pattern[str], search: _Search, starts: set[int]) -> set[int]:
    """One character, or an edge."""
    search.spend(len(starts))
    return {found.end() for start in starts if (found := compiled.match(search.text, start))}


def _branch(choices: Sequence[_Part], search: _Search, starts: set[int]) -> set[int]:
    return set().union(*(choice(search, starts) for choice in choices))


def _look(wanted: bool, body: _Part, search: _Search, starts: set[int]) -> set[int]:
    return {start for start in starts if bool(body(search, {start})) == wanted}


def _repeat(low: int, high: int, body: _Part, search: _Search, starts: set[int]) -> set[int]:
    """Positions never go back, so both loops end after about as many rounds as the name is long."""
    for _ in range(low):
        search.spend(1)
        following = body(search, starts)
        if following == starts:
            break
        starts = following
    found = new = starts
    for _ in range(high - low):
        search.spend(1)
        new = body(search, new) - found
        if not new:
            break
        found = found | new
    return found
