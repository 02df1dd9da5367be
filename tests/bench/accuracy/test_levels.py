"""The table of normal levels is what its derivation ends at."""

from itertools import combinations, product

import torch

from bench.accuracy import levels
from fqcompile.tensor.format import INT4, NORMAL4

W = levels.normal_weights(1 << 16)


def test_no_levels_can_be_moved_by_a_sixteenth_and_gain() -> None:
    """Each is within its last digit: 65536 weights of each size tell .2 % apart."""
    assert NORMAL4.sixteenths is not None
    numbers = levels.mirrored_numbers(NORMAL4.sixteenths)
    assert levels.mirrored(numbers) == NORMAL4.sixteenths
    own = levels.error_of(NORMAL4.sixteenths, W)
    for (first, last), step in product(combinations(range(len(numbers) + 1), 2), (1, -1)):
        trial = [n + step * (first <= i < last) for i, n in enumerate(numbers)]
        assert levels.error_of(levels.mirrored(trial), W) > own * 0.998, trial


def test_normal_levels_lose_a_fifth_less_than_integers() -> None:
    """On normal weights; .0066 against .0081 at groups of 64, of a variance of 1."""
    errors = [levels.squared_error(qtype, 64, W) for qtype in (INT4, NORMAL4)]
    assert errors[1] < 0.83 * errors[0] and errors[1] < 0.0068


def test_kinds_make_what_they_say() -> None:
    found = {kind: make(numbers_of(levels.table(NORMAL4.sixteenths or ()).sixteenths or ()))
             for kind, (make, numbers_of) in levels.KINDS.items()}  # fmt: skip
    assert found["free"] == found["with zero"] == found["mirrored"] == NORMAL4.sixteenths
    symmetric = torch.tensor(found["symmetric"])
    assert torch.equal(symmetric, -symmetric.flip(0)) and 0 not in symmetric


def test_a_derivation_ends_where_nothing_gains() -> None:
    w = W[: 1 << 13]
    make, numbers_of = levels.KINDS["symmetric"]
    start = numbers_of(NORMAL4.sixteenths or ())
    found = levels.descend(make, start, w)
    assert levels.error_of(make(found), w) <= levels.error_of(make(start), w)
    assert levels.descend(make, found, w) == found
