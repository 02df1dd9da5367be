"""Names of layers as few regular expressions that match just them, under every engine's names.

    model.layers.{0,2}.self_attn.{q,k,v}_proj
        -> re:(?:.*\\.)?layers\\.(?:0|2)\\.self_attn\\.(?:k_proj|q_proj|qkv_proj|v_proj)$

Engines put prefixes before names and fuse layers, so an expression begins where the first list of
modules does, and has the fused name too.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fqcompile.engines.module_names import fused_name, stack_of

_NUMBER = re.compile(r"\d+")
_ANY_PREFIX = r"(?:.*\.)?"


@dataclass(frozen=True, order=True)
class _Place:
    """A name cut into the list it is in, its number there, the module below, and its own name."""

    before: str
    number: str
    below: str
    own: str


def target_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions, `re:` before each, for `names`.

    Args:
        names: layers of one scheme. others: all further layers, which nothing may match.
    """
    wanted, rest = set(names), set(others)
    present = wanted | rest
    for whole_prefix in (False, True):
        patterns = _patterns(wanted, present, whole_prefix)
        compiled = [re.compile(p.removeprefix("re:")) for p in patterns]
        if not any(c.match(name) for c in compiled for name in rest):
            return patterns
    return sorted({_whole_name(name) for name in wanted})


def _patterns(wanted: set[str], present: set[str], whole_prefix: bool) -> list[str]:
    siblings: dict[tuple[str, str], dict[str, set[str]]] = {}
    for name in wanted:
        place = _place(name, whole_prefix)
        key = (place.before, place.below)
        owns = siblings.setdefault(key, {}).setdefault(place.number, set())
        owns |= {place.own, *_fused_own(name, present)}
    rows: dict[tuple[str, str, frozenset[str]], list[str]] = {}
    for (before, below), numbers in siblings.items():
        for number, owns in numbers.items():
            rows.setdefault((before, below, frozenset(owns)), []).append(number)
    return sorted(
        "re:" + _expression(before, numbers, below, owns)
        for (before, below, owns), numbers in rows.items()
    )


def _expression(before: str, numbers: list[str], below: str, owns: frozenset[str]) -> str:
    parts = [re.escape(before)] if before else []
    if any(numbers):
        parts.append(_either(sorted(numbers, key=int)))
    parts += [re.escape(below)] if below else []
    experts = owns == frozenset({""})
    parts += [] if experts else [_either(sorted(map(re.escape, owns)))]
    return _ANY_PREFIX + r"\.".join(parts) + (r"(?:\..*)?$" if experts else "$")


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def _place(name: str, whole_prefix: bool) -> _Place:
    """Experts count as one layer, without a name of its own."""
    stack = stack_of(name)
    parent, _, own = (name, "", "") if stack is None else (stack, "", "")
    if stack is None:
        parent, _, own = name.rpartition(".")
    path = parent.split(".") if parent else []
    index = next((i for i, part in enumerate(path) if _NUMBER.fullmatch(part)), None)
    if index is None:
        return _Place("", "", parent, own)
    start = 0 if whole_prefix else max(0, index - 1)
    return _Place(".".join(path[start:index]), path[index], ".".join(path[index + 1 :]), own)


def _fused_own(name: str, present: set[str]) -> set[str]:
    if stack_of(name) is not None:
        return set()
    fused = fused_name(name, present)
    return {fused.rpartition(".")[2]} if fused != name else set()


def _whole_name(name: str) -> str:
    stack = stack_of(name)
    return f"re:{re.escape(name)}$" if stack is None else rf"re:{re.escape(stack)}(?:\..*)?$"
