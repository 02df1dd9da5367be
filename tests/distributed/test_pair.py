"""A test that breaks the ranks it shares with others fails alone."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pair import Function, Pair


def total(own: int) -> tuple[int, int]:
    """A collective, to see that both are in step: the sum, and who this is."""
    value = torch.tensor(own * (1 + dist.get_rank()))
    dist.all_reduce(value)
    return int(value), os.getpid()


def raise_before_the_other_comes() -> None:
    if dist.get_rank():
        raise ValueError("broken here")
    dist.barrier()


def hang() -> None:
    time.sleep(600 if dist.get_rank() else 0)


def die() -> None:
    if dist.get_rank():
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_ranks_are_shared(ranks: Pair) -> None:
    (first, zero), (second, one) = ranks.run(total, 5)
    assert first == second == 15 and zero != one
    assert ranks.run(total, 7) == [(21, zero), (21, one)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (raise_before_the_other_comes, "Traceback"),
        (hang, "no answer in 10 s"),
        (die, "the process ended"),
    ],
)
def test_a_broken_rank_is_replaced(ranks: Pair, broken: Function, text: str) -> None:
    before = ranks.run(total, 1)
    good, answer = ranks.outcomes(broken, seconds=10)[1]
    assert not good and text in answer
    (first, _), (second, _) = after = ranks.run(total, 5)
    assert first == second == 15
    assert {pid for _, pid in before}.isdisjoint(pid for _, pid in after)


@pytest.mark.slow
def test_a_failure_ends_the_test_that_has_it(ranks: Pair) -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1: Traceback"):
        ranks.run(raise_before_the_other_comes, seconds=10)
    assert [value for value, _ in ranks.run(total, 5)] == [15, 15]


def test_a_rank_that_dies_between_two_requests_is_replaced(ranks: Pair) -> None:
    (_, pid), _ = ranks.run(total, 1)
    os.kill(pid, signal.SIGKILL)
    ranks._ranks[0][0].join(60)
    assert [value for value, _ in ranks.run(total, 5)] == [15, 15]


def test_what_cannot_be_sent_breaks_nothing(ranks: Pair) -> None:
    ranks.run(total, 1)
    with pytest.raises(Exception, match="pickle"):
        ranks.run(total, lambda: None)
    assert [value for value, _ in ranks.run(total, 5)] == [15, 15]
