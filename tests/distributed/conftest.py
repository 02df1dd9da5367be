"""The two ranks that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.distributed.pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    ranks = Pair()
    yield ranks
    ranks.close()
