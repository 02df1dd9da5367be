"""Patterns of files mean what they mean to `re`, and are matched in bounded time."""

import random
import re
import time

import pytest

from fqcompile.errors import CheckpointError
from fqcompile.files import untrusted
from fqcompile.files.untrusted import LONGEST_PATTERN, check_pattern, matches_pattern

ATOMS = """a b ab . [ab] [^a] (?:a|b) (a|ab) a* b+ (?:ab)* a? (?:a|) (?:a*b)* ^ $ (?=a) (?!b) a{2,3}
    (?:a?){3} \\w \\b (?:(?:a|b?)*c)* (?:a?b?)*? a+? (?:^a)* (?:$|a){2,} (?:(?!a)|b){3}""".split()


@pytest.mark.parametrize("always", [False, True])
def test_they_match_what_re_matches(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`always`: without handing anything to `re`."""
    if always:
        monkeypatch.setattr(untrusted, "_FEW_WAYS", -1)
    untrusted._matcher.cache_clear()
    rng, matched = random.Random(0), 0
    for _ in range(5000):
        pattern = "".join(rng.choice(ATOMS) for _ in range(rng.randint(1, 4)))
        name = "".join(rng.choice("abc\n") for _ in range(rng.randint(0, 7)))
        expected = re.match(pattern, name) is not None
        assert matches_pattern(pattern, name) == expected, (pattern, name)
        matched += expected
    assert 1000 < matched < 4000
    untrusted._matcher.cache_clear()


SLOW = {  # each takes `re` more than years on a name of 500 characters, or as good as that
    "(a+)+$": "a" * 500 + "!",
    "(?:a|a)*$": "a" * 500 + "!",
    "(?:a?){400}a{500}b": "a" * 500,
    "(a|a)" * 400 + "b": "a" * 500,
    "((a*)*)*b": "a" * 500,
    "(?!(a+)+b)(.*.*)*x": "a" * 500,
    ".*.*.*.*.*.*.*x": "model.layers." * 40,
}


@pytest.mark.parametrize("pattern", SLOW, ids=range(len(SLOW)))
def test_backtracking_is_bounded(pattern: str) -> None:
    start = time.process_time()
    try:
        check_pattern(pattern, "config.json: ignore[0]")
        assert not matches_pattern(pattern, SLOW[pattern])
    except CheckpointError as error:
        assert "steps" in str(error)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "which is not a regular expression"),
        ("a" * (LONGEST_PATTERN + 1), "a pattern of 65537 characters; at most 65536"),
        ("(" * 3000 + ")" * 3000, "which is not a regular expression"),
        ("a{9999999999999}", "which is not a regular expression"),
        (r"(a*)*\1", "cannot be matched in bounded time: it has groupref"),
        ("(?<=a)(a*)*", "cannot be matched in bounded time: it has assert"),
    ],
    ids=range(6),
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        check_pattern(pattern, "config.json: ignore[0]")
    assert str(error.value).startswith("config.json: ignore[0] is ")
