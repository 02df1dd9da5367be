"""The rule of each option: `RULES[name](label, value)` returns what to store or raises OptionError.

`label` is the option as the user wrote it, such as `bits` or `overrides['lm_head'].bits`.
"""

import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

from fqcompile.errors import OptionError, nearest
from fqcompile.torch_compat import list_mode_options, list_options

Rule = Callable[[str, object], object]

# Options that earlier versions had, with what to do instead.
_REMOVED = {
    "free_weights": "free_weights was removed: call fqcompile.quantize_(model) before "
    "torch.compile, which leaves no dense copy of a packed weight",
}
# What an environment variable says that switches something, in capitals too.
_SWITCH = {True: ("1", "true", "on", "yes"), False: ("0", "false", "off", "no")}


class FrozenMapping(Mapping[str, object]):
    """A read-only, hashable mapping whose order counts in comparisons (the first match wins).

    Only the keys are hashed: values need not be hashable and are passed on unchanged.
    """

    def __init__(self, items: Mapping[str, object] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> object:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return list(self.items()) == list(other.items())

    def __repr__(self) -> str:
        return repr(self._items)


def switched_on(variable: str, usual: bool) -> bool:
    """What an environment variable that switches something says; `usual` where it is not set.

    Raises:
        OptionError: it says something else.
    """
    text = os.environ.get(variable, "")
    for on, words in _SWITCH.items():
        if text.strip().lower() in words:
            return on
    if not text.strip():
        return usual
    allowed = " and ".join(", ".join(words) for words in _SWITCH.values())
    raise OptionError(f"environment variable {variable} is {text!r}; allowed: {allowed}")


def _refusal(label: str, value: object, allowed: str, hint: str = "") -> OptionError:
    kind = "" if value is None else f" ({type(value).__name__})"
    return OptionError(f"option {label} is {reprlib.repr(value)}{kind}; allowed: {allowed}{hint}")


def check_names(names: Iterable[object], allowed: Iterable[str], owner: str = "") -> None:
    """Raise OptionError for the first unknown name, suggesting the nearest known one."""
    known = list(allowed)
    for name in names:
        if name in known:
            continue
        if not isinstance(name, str):
            kind = type(name).__name__
            raise OptionError(f"option {owner}{name!r} ({kind}) has no name; names are strings")
        if owner and name in RULES:
            hint = f"; {name} holds for the whole model: give it outside overrides"
        elif name in _REMOVED:
            hint = f"; {_REMOVED[name]}"
        elif "inductor" in known and name.replace("-", "_") in list_options():
            hint = f"; {name} is a setting of Inductor: give it as inductor={{{name!r}: ...}}"
        else:
            hint = nearest(name, known)
        raise OptionError(f"unknown option {owner}{name}; allowed: {', '.join(known)}{hint}")


def check_levels(options: Mapping[str, object], owner: str = "") -> None:
    """Raise OptionError if these options, given together, ask for levels that 8 bits do not have.

    By default nothing is asked for: then 4 bits have normal levels and 8 bits uniform ones.
    """
    if options.get("bits") == 8 and options.get("levels") == "normal":
        raise OptionError(
            f"option {owner}levels is 'normal', and bits are 8, which are always uniform: drop "
            f"levels, or give {owner}bits 4"
        )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(*choices: object) -> Rule:
    """One of a few values, with the same type: True is not 1 and 4.0 is not 4."""
    allowed = ", ".join(map(repr, choices))
    names = [c for c in choices if isinstance(c, str)]

    def rule(label: str, value: object) -> object:
        if any(type(value) is type(c) and value == c for c in choices):
            return value
        hint = nearest(value, names) if isinstance(value, str) else ""
        raise _refusal(label, value, allowed, hint)

    return rule


def number(low: float, high: float, allowed: str) -> Rule:
    """A float strictly between two bounds; an int is converted to float, NaN is refused."""

    def rule(label: str, value: object) -> object:
        if (isinstance(value, float) or _is_int(value)) and low < value < high:
            return float(value)
        raise _refusal(label, value, allowed)

    return rule


def optional(inner: Rule) -> Rule:
    """None, or a value that `inner` accepts."""
    return lambda label, value: None if value is None else inner(label, value)


def at_least(low: int) -> Rule:
    """An int with a lower bound."""

    def rule(label: str, value: object) -> object:
        if _is_int(value) and value >= low:
            return value
        raise _refusal(label, value, f"an int >= {low}")

    return rule


def power_of_two(label: str, value: object) -> object:
    """A power of two >= 1, like the group sizes that the granularity rules try."""
    if _is_int(value) and value >= 1 and value & (value - 1) == 0:
        return value
    hint = ""
    if _is_int(value) and value > 1:
        below = 1 << (value.bit_length() - 1)
        hint = f"; nearest: {below} and {2 * below}"
    raise _refusal(label, value, "a power of two >= 1", hint)


def granularity(label: str, value: object) -> object:
    """The name of a granularity rule, or a group size along K."""
    names = ("adaptive", "range", "column")
    hint = ""
    if isinstance(value, str):
        if value in names:
            return value
        digits = value.isascii() and value.isdigit()
        hint = f"; did you mean the int {value}?" if digits else nearest(value, names)
    elif _is_int(value) and value >= 1:
        return value
    allowed = ", ".join(map(repr, names)) + ", or the group size along K, an int >= 1"
    raise _refusal(label, value, allowed, hint)


def _regex(label: str, pattern: object) -> str:
    if not isinstance(pattern, str):
        raise _refusal(label, pattern, "a regular expression on parameter names, as a string")
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        any_begin = f"; for any beginning write {'.' + pattern!r}" if pattern[:1] == "*" else ""
        raise OptionError(
            f"option {label} is {pattern!r}, which is not a regular expression: {error}{any_begin}"
        ) from error
    return pattern


def regexes(label: str, value: object) -> tuple[str, ...]:
    """A list or tuple of regular expressions."""
    if not isinstance(value, list | tuple):
        hint = f"; write [{value!r}]" if isinstance(value, str) else ""
        raise _refusal(label, value, "a list of regular expressions on parameter names", hint)
    return tuple(_regex(f"{label}[{i}]", pattern) for i, pattern in enumerate(value))


def overrides(label: str, value: object) -> object:
    """A mapping from a regular expression to per-site options."""
    if not isinstance(value, Mapping):
        raise _refusal(label, value, "a dict {regular expression: {option: value}}")
    checked: dict[str, object] = {}
    for pattern, options in value.items():
        here = f"{label}[{_regex(f'{label} (a key)', pattern)!r}]"
        if not isinstance(options, Mapping):
            raise _refusal(here, options, f"a dict of {', '.join(SITE_RULES)}")
        check_names(options, SITE_RULES, owner=f"{here}.")
        checked[pattern] = FrozenMapping(
            {key: SITE_RULES[key](f"{here}.{key}", item) for key, item in options.items()}
        )
    return FrozenMapping(checked)


def inductor_patches(label: str, value: object) -> object:
    """Config patches for Inductor: names are checked here, before any work; values by Inductor."""
    if not isinstance(value, Mapping):
        raise _refusal(label, value, "a dict {name of an Inductor setting: value}")
    for name in value:
        if name not in list_options():
            hint = nearest(str(name), list_options())
            allowed = "the names in torch._inductor.list_options()"
            raise OptionError(f"option {label} has the key {name!r}; allowed: {allowed}{hint}")
    return FrozenMapping(value)


def directory(label: str, value: object) -> object:
    """A path that is a directory or can become one."""
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        path = os.path.expanduser(os.fsdecode(value))
        if os.path.isdir(path) or not os.path.exists(path):
            return Path(path)
    raise _refusal(label, value, "the path of a directory (default: $FQCOMPILE_DEBUG_DIR)")


def backend_name(label: str, value: object) -> object:
    """The name of another torch.compile backend; finequant inside itself would recurse forever."""
    if isinstance(value, str) and value and value != "finequant":
        return value
    raise _refusal(label, value, "the name of a torch.compile backend other than 'finequant'")


SITE_RULES: Mapping[str, Rule] = {
    "bits": one_of(4, 8),
    "levels": one_of("normal", "uniform"),
    "granularity": granularity,
    "alpha": number(0, 1, "a number with 0 < alpha < 1"),
    "min_group_size": power_of_two,
    "error_budget": optional(number(0, sys.float_info.max, "None or a finite number > 0")),
    "scale_method": one_of("mse", "absmax"),
}
RULES: Mapping[str, Rule] = {
    **SITE_RULES,
    "include": regexes,
    "exclude": regexes,
    "overrides": overrides,
    "min_elements": at_least(0),
    "quantize_embeddings": one_of(None, 8),
    "on_unsupported": one_of("keep", "error"),
    "weight_updates": one_of("detect", "ignore"),
    "fuse_attention": one_of(True, False),
    "autotune": one_of("off", "fast", "max"),
    "calibration": one_of(None, "synthetic", "first_call"),
    "debug_dir": optional(directory),
    "inner_backend": backend_name,
    "inductor": inductor_patches,
    "mode": one_of(None, *list_mode_options()),
}
