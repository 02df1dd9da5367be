"""Two tiers: `pytest` touches every kind of thing in minutes, `pytest --all` runs every test.

What the first leaves out: tests marked `slow`; of a product of two parameters all but some cases
that hold every value, of more parameters all but some that hold every pair of values; three of four
examples of Hypothesis.
"""

import os
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations, groupby
from typing import Any

import pytest
from hypothesis import settings

_ALL = "FQTEST_ALL"  # in the environment, where decorators and the workers of xdist find it
_MOST = 8  # cases of one test that all are run


def configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    if config.getoption("--all") or config.option.markexpr:
        os.environ[_ALL] = "1"
    name = "all" if runs_all() else "quick"
    settings.register_profile("all", max_examples=25, deadline=None)
    settings.register_profile("quick", max_examples=8, deadline=None)
    settings.load_profile(name)


def runs_all() -> bool:
    """Whether every test runs."""
    return os.environ.get(_ALL) == "1"


def examples(count: int) -> int:
    """How many examples a test of that many runs in this tier."""
    return count if runs_all() else max(5, count // 4)


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests that this tier does not run."""
    if runs_all():
        return []
    found = [item for item in items if item.get_closest_marker("slow")]
    for _, cases in groupby(items, key=_function_of):
        own = list(cases)
        values = [_values(item) for item in own]
        if len(own) > _MOST and min(map(len, values)) > 1:
            kept = cover(values, 1 if max(map(len, values)) == 2 else 2)
            found += [item for i, item in enumerate(own) if i not in kept]
    return found


def _function_of(item: pytest.Item) -> tuple[object, ...]:
    return item.path, getattr(item, "originalname", item.name), item.parent


def _values(item: pytest.Item) -> dict[str, Hashable]:
    """Of its parameters, by identity: cases share the objects, and not all can be compared."""
    call = getattr(item, "callspec", None)
    return {} if call is None else {name: id(value) for name, value in call.params.items()}


def cover(cases: Sequence[dict[str, Any]], strength: int = 2) -> set[int]:
    """Positions of some cases that hold all that any holds: pairs of parameters' values, or values.

    Greedy: the case with most that is new is next, the first among equals.
    """
    pairs = [set(combinations(sorted(case.items()), strength)) for case in cases]
    missing: set[object] = set().union(*pairs)
    kept: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        kept.add(best)
        missing -= pairs[best]
    return kept


def deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out of `items` what this tier does not run."""
    out: Iterable[pytest.Item] = left_out(items)
    ids = set(map(id, out))
    if ids:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in ids])
        items[:] = [item for item in items if id(item) not in ids]
