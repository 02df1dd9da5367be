"""Two tiers: `pytest` touches every kind of thing in minutes, `pytest --all` runs every test.

What the first leaves out: tests marked `slow`; of a product of two parameters all but some cases
that hold every value, of more parameters all but some that hold every pair of values; of a test
marked `few(n)` all but n cases, as different as can be; most examples of Hypothesis.
"""

import os
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations, groupby
from typing import Any

import pytest
from hypothesis import settings

_ALL = "FQTEST_ALL"  # in the environment, where decorators and the workers of xdist find it
_MOST = 4  # cases of one test that all are run


def configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    if config.getoption("--all") or config.option.markexpr:
        os.environ[_ALL] = "1"
    name = "all" if runs_all() else "quick"
    settings.register_profile("all", max_examples=25, deadline=None)
    settings.register_profile("quick", max_examples=5, deadline=None)
    settings.load_profile(name)


def runs_all() -> bool:
    """Whether every test runs."""
    return os.environ.get(_ALL) == "1"


def examples(count: int) -> int:
    """How many examples a test of that many runs in this tier."""
    return count if runs_all() else min(count, max(4, count // 8))


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests that this tier does not run."""
    if runs_all():
        return []
    found = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    for _, cases in groupby(fast, key=_function_of):
        own = list(cases)
        kept = set(_kept(own))
        found += [item for i, item in enumerate(own) if i not in kept]
    return found


def _kept(cases: Sequence[pytest.Item]) -> Iterable[int]:
    """Positions of the cases of one test that are run."""
    values = [_values(item) for item in cases]
    if few := cases[0].get_closest_marker("few"):
        return spread(values, *few.args)
    if len(cases) <= _MOST or min(map(len, values)) < 2:
        return range(len(cases))
    return cover(values, 1 if max(map(len, values)) == 2 else 2)


def _function_of(item: pytest.Item) -> tuple[object, ...]:
    return item.path, getattr(item, "originalname", item.name), item.parent


def _values(item: pytest.Item) -> dict[str, Hashable]:
    """Of its parameters, by identity: cases share the objects, and not all can be compared."""
    call = getattr(item, "callspec", None)
    return {} if call is None else {name: id(value) for name, value in call.params.items()}


def cover(cases: Sequence[dict[str, Any]], strength: int = 2) -> list[int]:
    """Positions of some cases that hold all that any holds: pairs of parameters' values, or values.

    Greedy: the case with most that is new is next, the first among equals.
    """
    pairs = [set(combinations(sorted(case.items()), strength)) for case in cases]
    missing: set[object] = set().union(*pairs)
    kept: list[int] = []
    while missing:
        kept.append(max(range(len(cases)), key=lambda i: len(pairs[i] & missing)))
        missing -= pairs[kept[-1]]
    return kept


def spread(cases: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Positions of so many cases, from all over the list, that differ in as much as can be."""
    count = min(count, len(cases))
    order = sorted(range(len(cases)), key=lambda i: i * 0.618 % 1)  # neighbors lie far apart
    found = [order[i] for i in cover([cases[i] for i in order], 1)]
    return list(dict.fromkeys(found + order))[:count]


def deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out of `items` what this tier does not run."""
    out: Iterable[pytest.Item] = left_out(items)
    ids = set(map(id, out))
    if ids:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in ids])
        items[:] = [item for item in items if id(item) not in ids]
