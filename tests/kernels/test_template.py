"""Routing: which rows go to which expert, checked against the definition row by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.kernels.template import Routing

integers = st.sampled_from([torch.int32, torch.int64])


def listed(routing: Routing, experts: int, m: int) -> dict[int, list[int]]:
    """Rows of each expert, as plain numbers."""
    all_rows = torch.arange(m)
    return {e: all_rows[rows].tolist() for e, rows in routing.rows_of_experts(experts, m)}


@given(st.integers(1, 9), st.data(), integers)
def test_ids_are_found_where_they_stand(experts: int, data: st.DataObject, dtype) -> None:
    ids = data.draw(st.lists(st.integers(-experts, experts - 1), max_size=20), label="ids")
    found = listed(Routing(ids=torch.tensor(ids, dtype=dtype)), experts, len(ids))
    want: dict[int, list[int]] = {}
    for row, index in enumerate(ids):
        want.setdefault(index % experts, []).append(row)
    assert found == want


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 4), integers)
def test_offsets_end_each_experts_run(counts: list[int], beyond: int, dtype) -> None:
    offsets = torch.tensor(counts).cumsum(0).to(dtype)
    found = listed(Routing(offsets=offsets), len(counts), sum(counts) + beyond)
    rows = iter(range(sum(counts)))
    want = {e: [next(rows) for _ in range(n)] for e, n in enumerate(counts) if n}
    assert found == want


@pytest.mark.parametrize("bad", [3, -4, 1 << 40])
def test_id_of_no_expert_is_refused_by_place(bad: int) -> None:
    with pytest.raises(
        IndexError, match=rf"ids\[1\] is {bad}; the weight has 3 experts, .* -3 to 2"
    ):
        listed(Routing(ids=torch.tensor([0, bad, 1])), 3, 3)


@pytest.mark.parametrize(
    ("offsets", "reason"),
    [
        ([1, 0, 2], r"offsets\[1\] falls"),
        ([-1, 0, 2], r"offsets\[0\] falls"),
        ([1, 2, 9], "over 4"),
    ],
)
def test_offsets_that_fall_or_pass_the_rows_are_refused(offsets: list[int], reason: str) -> None:
    with pytest.raises(IndexError, match=reason):
        listed(Routing(offsets=torch.tensor(offsets)), 3, 4)


def test_neighboring_rows_are_a_slice() -> None:
    """So that reading them makes no copy."""
    found = dict(Routing(ids=torch.tensor([1, 1, 0, 2, 0])).rows_of_experts(3, 5))
    assert isinstance(found[1], slice) and isinstance(found[2], slice)
    assert isinstance(found[0], Tensor)
