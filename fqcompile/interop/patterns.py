"""Match untrusted regular expressions with the semantics of `re.match`, in bounded time.

Most are passed to `re`. Patterns that could make `re` backtrack too much (nested repeats, several
repeats in a row) are matched without backtracking: part by part, as a set of reachable positions.

    (a+)+b on "aaac":   {0}  -(a+)+->  {1, 2, 3}  -b->  {}
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from math import prod
from typing import Any

from fqcompile.errors import CheckpointError
from fqcompile.files.json_text import shown

_parser, _compiler = import_module("re._parser"), import_module("re._compiler")

LONGEST_PATTERN = 1 << 16
# What `re` may try for a name of a usual length, and how many steps a name may take without it.
_FEW_WAYS, _USUAL_LENGTH, _STEPS = 1 << 16, 64, 1 << 18
_TOO_MANY = _FEW_WAYS + 1
_REMEDY = "write it without repeats inside repeats"


@dataclass
class _Search:
    pattern: str
    text: str
    steps: int = _STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise CheckpointError(
                f"the pattern {shown(repr(self.pattern))} takes more than {_STEPS} steps on "
                f"{shown(self.text)}; {_REMEDY}"
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
            f"{error}; {_REMEDY}"
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
