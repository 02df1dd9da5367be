"""What the quick tier leaves out, and what it must not."""

from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiers import cover, examples, spread

pytest_plugins = ["pytester"]
CONFTEST = """
import pytest
from tests import tiers

def pytest_addoption(parser):
    parser.addoption("--all", action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes")
    config.addinivalue_line("markers", "few(n): n cases")
    tiers.configure(config)

def pytest_collection_modifyitems(config, items):
    tiers.deselect(config, items)
"""
TESTS = """
import pytest

@pytest.mark.slow
def test_minutes(): pass

@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", range(3))
def test_product(a, b, c): pass

@pytest.mark.parametrize("a", range(30))
def test_list(a): pass

@pytest.mark.parametrize("a", range(2))
@pytest.mark.parametrize("b", range(2))
def test_small_product(a, b): pass

@pytest.mark.few(3)
@pytest.mark.parametrize("a", range(30))
def test_few(a): pass
"""


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.randoms())
def test_a_cover_has_every_pair_and_little_more(sizes: list[int], random: object) -> None:
    cases = [dict(enumerate(values)) for values in product(*(range(n) for n in sizes))]
    kept = cover(cases)
    assert len(set(kept)) == len(kept)
    for a, b in combinations(range(len(sizes)), 2):
        wanted = {(case[a], case[b]) for case in cases}
        assert {(cases[i][a], cases[i][b]) for i in kept} == wanted
    largest, second = sorted(sizes)[-1], sorted(sizes)[-2]
    assert len(kept) <= 2 * largest * second + len(sizes)


def test_values_alone() -> None:
    cases = [{"a": a, "b": b} for a in range(5) for b in range(3)]
    assert len(cover(cases, 1)) == 5


def test_a_pair_that_never_meets_is_not_missed() -> None:
    cases = [{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 1}]
    assert cover(cases) == [0, 1]


def test_few_cases_are_far_apart_and_hold_every_value_where_they_can() -> None:
    ends = spread([{"a": a} for a in range(30)], 3)
    assert len({i // 10 for i in ends}) == 3
    cases = [{"a": a, "b": b} for a in range(10) for b in range(3)]
    kept = [cases[i] for i in spread(cases, 5)]
    assert len({case["a"] for case in kept}) == 5
    assert {case["b"] for case in kept} == {0, 1, 2}
    assert sorted(spread(cases, 99)) == list(range(30))


@pytest.mark.parametrize(
    ("option", "passed"), [([], 12 + 30 + 4 + 3), (["--all"], 1 + 48 + 30 + 4 + 30)]
)
def test_the_tiers(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    passed: int,
) -> None:
    monkeypatch.delenv("FQTEST_ALL", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    counts = pytester.runpytest_subprocess("-p", "no:cacheprovider", *option).parseoutcomes()
    assert passed <= counts["passed"] <= passed + 6, "a cover need not be the least one"


def test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQTEST_ALL", "0")
    assert [examples(n) for n in (3, 20, 100)] == [3, 4, 12]
    monkeypatch.setenv("FQTEST_ALL", "1")
    assert examples(100) == 100
