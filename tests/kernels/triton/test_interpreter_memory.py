"""Each check of the interpreter's memory is seen to fire, and not beside what it forbids."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.interpreter_memory import RaceError


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, STEP, BLOCK: tl.constexpr):
    """Program i copies the BLOCK elements from i * STEP on, of N."""
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def _scatter_kernel(x_ptr, index_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.load(index_ptr + offs), tl.load(x_ptr + offs))


@triton.jit
def _store_as_kernel(x_ptr, TYPE: tl.constexpr):
    tl.store(x_ptr.to(tl.pointer_type(TYPE)), 1)


@triton.jit
def _one_does_not_ask_kernel(x_ptr, lock_ptr):
    if tl.program_id(0) == 0:
        tl.store(x_ptr, 1.0)
    if tl.program_id(0) < 2:
        tl.atomic_add(lock_ptr, 1)
    else:
        tl.load(x_ptr)


@triton.jit
def _pass_on_kernel(x_ptr, y_ptr, FORWARDS: tl.constexpr):
    """Program i stores y[i] and loads that of the program before, or of the one after."""
    i = tl.program_id(0)
    other = tl.where(FORWARDS, i - 1, i + 1)
    tl.store(y_ptr + i, i)
    tl.store(x_ptr + i, tl.load(y_ptr + other, mask=(other >= 0) & (other < 4), other=0))


@triton.jit
def _access(x_ptr, HOW: tl.constexpr):
    offs = tl.arange(0, 2)
    if HOW == "loads":
        tl.load(x_ptr + offs)
    elif HOW == "stores":
        tl.store(x_ptr + offs, 1.0)
    else:
        tl.atomic_add(x_ptr + offs, 1.0)


@triton.jit
def _two_programs_kernel(x_ptr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if tl.program_id(0) == 0:
        _access(x_ptr, FIRST)
    else:
        _access(x_ptr, SECOND)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, INITIALIZE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if INITIALIZE and tl.program_id(0) == 0:
        tl.store(y_ptr + offs, tl.zeros((BLOCK,), tl.float32))
    tl.atomic_add(y_ptr + offs, tl.load(x_ptr + tl.program_id(0) * BLOCK + offs))


@triton.jit
def _split_k_kernel(x_ptr, scratch_ptr, lock_ptr, y_ptr, SEM: tl.constexpr, LATE: tl.constexpr):
    """The last of the programs to arrive adds what all have left in the scratch memory."""
    i = tl.program_id(0)
    offs = tl.arange(0, 4)
    x = tl.load(x_ptr + i * 4 + offs)
    if not LATE:
        tl.store(scratch_ptr + i * 4 + offs, x)
    arrived = tl.atomic_add(lock_ptr, 1, sem=SEM)
    if LATE:
        tl.store(scratch_ptr + i * 4 + offs, x)
    if arrived == tl.num_programs(0) - 1:
        total = tl.zeros((4,), tl.float32)
        for other in range(tl.num_programs(0)):
            total += tl.load(scratch_ptr + other * 4 + offs)
        tl.store(y_ptr + offs, total)


def test_an_access_outside_of_the_tensors_raises() -> None:
    x, y = torch.arange(8.0), torch.zeros(8)
    with interpreted():
        _copy_kernel[(1,)](x, y, 8, 0, BLOCK=16)
        assert torch.equal(x, y)
        with pytest.raises(IndexError, match=r"1 of 9 lanes are out .* loads .* start of x_ptr"):
            _copy_kernel[(1,)](x, y, 9, 0, BLOCK=16)
        with pytest.raises(IndexError, match=r"1 of 8 .* stores to 4 bytes, 28 bytes .* of y_ptr"):
            _copy_kernel[(1,)](x, y[:7], 8, 0, BLOCK=16)
        with pytest.raises(IndexError, match=r"4 of 4 .* loads 4 bytes, 32 bytes .* of x_ptr"):
            _sum_kernel[(3,)](x, y[:4], False, BLOCK=4)
        with pytest.raises(IndexError, match=r"4 of 4 .* loads 4 bytes, -16 bytes .* of x_ptr"):
            _copy_kernel[(2,)](x[4:], y[4:], 4, -4, BLOCK=4)


def test_a_pointer_does_not_reach_another_argument() -> None:
    both = torch.arange(16.0)
    with interpreted():
        with pytest.raises(IndexError, match=r"2 of 8 lanes .* of y_ptr"):
            _copy_kernel[(1,)](both[6:], both[:6], 8, 0, BLOCK=16)
        with pytest.raises(IndexError, match=r"1 of 1 lanes .* y_ptr has no elements"):
            _copy_kernel[(1,)](both, both[:0], 1, 0, BLOCK=16)


def test_what_is_between_the_rows_of_a_view_is_outside_of_it() -> None:
    x, y = torch.arange(16.0), torch.zeros(2, 8)
    with interpreted():
        with pytest.raises(IndexError, match="6 of 14 lanes"):
            _copy_kernel[(1,)](x, y[:, 1:5], 14, 0, BLOCK=16)
        _copy_kernel[(1,)](x, y[:, 1:5], 4, 0, BLOCK=16)
    assert y[0].tolist() == [0, 0, 1, 2, 3, 0, 0, 0]


def test_an_access_across_elements_raises() -> None:
    with interpreted(), pytest.raises(IndexError, match="not aligned"):
        _store_as_kernel[(1,)](torch.zeros(8, dtype=torch.int8)[1:], tl.int32)


def test_programs_that_store_to_the_same_byte_race() -> None:
    x, y = torch.arange(32.0), torch.zeros(32)
    with interpreted():
        _copy_kernel[(2,)](x, y, 32, 16, BLOCK=16)
        match = r"program \(1, 0, 0\) stores to y_ptr at byte 60, which program \(0, 0, 0\) stored"
        with pytest.raises(RaceError, match=match):
            _copy_kernel[(2,)](x, y, 32, 15, BLOCK=16)
        # Of two launches, the second comes after the first.
        _copy_kernel[(1,)](x, y, 32, 16, BLOCK=16)


def test_the_offset_is_that_in_the_view() -> None:
    x, y = torch.arange(32.0), torch.zeros(40)
    with interpreted(), pytest.raises(RaceError, match="y_ptr at byte 60"):
        _copy_kernel[(2,)](x, y[8:], 32, 15, BLOCK=16)


def test_views_of_the_same_memory_share_their_history() -> None:
    both = torch.arange(33.0)
    with interpreted():
        with pytest.raises(RaceError, match=r"loads x_ptr at byte 64, which .* stored to"):
            _copy_kernel[(2,)](both[:-1], both[1:], 32, 16, BLOCK=16)
        with pytest.raises(RaceError, match=r"stores to y_ptr at byte 64, which .* loaded"):
            _copy_kernel[(2,)](both[1:], both[:-1], 32, 16, BLOCK=16)
        # In place: no program touches what another has.
        _copy_kernel[(2,)](both, both, 32, 16, BLOCK=16)


@pytest.mark.parametrize(
    ("forwards", "match"),
    [
        (True, r"program \(1, 0, 0\) loads y_ptr at byte 0, which program \(0, 0, 0\) stored to"),
        (False, r"program \(1, 0, 0\) stores to y_ptr at byte 4, which program \(0, 0, 0\) loaded"),
    ],
)
def test_a_race_names_both_programs_and_what_they_did(forwards: bool, match: str) -> None:
    x, y = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with interpreted(), pytest.raises(RaceError, match=match):
        _pass_on_kernel[(4,)](x, y, forwards)


@pytest.mark.parametrize("second", ["loads", "stores", "updates"])
@pytest.mark.parametrize("first", ["loads", "stores", "updates"])
def test_two_programs_race_unless_both_load_or_both_are_atomic(first: str, second: str) -> None:
    harmless = first == second and first != "stores"
    with interpreted():
        _two_programs_kernel[(1,)](torch.zeros(2), first, second)
        with nullcontext() if harmless else pytest.raises(RaceError, match=second):
            _two_programs_kernel[(2,)](torch.zeros(2), first, second)


def test_a_store_after_loads_by_several_programs_is_a_race() -> None:
    x = torch.zeros(4)
    index = torch.tensor([1, 2, 3, 0])
    with interpreted(), pytest.raises(RaceError, match="several loaded"):
        # All three load the whole of x; only the last of them stores there.
        _last_stores_kernel[(3,)](x, index)


@triton.jit
def _last_stores_kernel(x_ptr, index_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4)) + tl.load(index_ptr + tl.arange(0, 4))
    if tl.program_id(0) == 2:
        tl.store(x_ptr + tl.arange(0, 4), x)


def test_lanes_of_a_store_may_only_agree() -> None:
    y, index = torch.zeros(4), torch.tensor([0, 1, 2, 2])
    with interpreted():
        _scatter_kernel[(1,)](torch.tensor([1.0, 2.0, 3.0, 3.0]), index, y, BLOCK=4)
        with pytest.raises(RaceError, match="lanes of one store"):
            _scatter_kernel[(1,)](torch.tensor([1.0, 2.0, 3.0, 4.0]), index, y, BLOCK=4)


def test_atomics_do_not_race_with_atomics() -> None:
    x = torch.randn(3, 8)
    with interpreted() as memory:
        y = torch.zeros(8)
        assert memory.unwritten(y) == 8
        _sum_kernel[(3,)](x, y, False, BLOCK=8)
        assert memory.unwritten(y) == 0
        torch.testing.assert_close(y, x.sum(0))
        with pytest.raises(RaceError, match=r"updates y_ptr at byte 0, which .* stored to"):
            _sum_kernel[(3,)](x, y, True, BLOCK=8)


def _split_k(sem: str | None, late: bool) -> torch.Tensor:
    x = torch.arange(12.0).reshape(3, 4)
    with interpreted():
        scratch, y, lock = torch.empty(3, 4), torch.empty(4), torch.zeros(1, dtype=torch.int32)
        _split_k_kernel[(3,)](x, scratch, lock, y, sem, late)
    return y


@pytest.mark.parametrize("sem", [None, "acq_rel"])
def test_an_atomic_counter_orders_what_came_before_it(sem: str | None) -> None:
    assert _split_k(sem, late=False).tolist() == [12, 15, 18, 21]


@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release"])
def test_a_counter_without_acquire_or_release_orders_nothing(sem: str) -> None:
    with pytest.raises(RaceError, match="loads scratch_ptr"):
        _split_k(sem, late=False)


def test_a_counter_does_not_order_what_comes_after_it() -> None:
    with pytest.raises(RaceError, match="loads scratch_ptr"):
        _split_k("acq_rel", late=True)


def test_a_counter_orders_only_those_that_ask_it() -> None:
    with interpreted(), pytest.raises(RaceError, match="loads x_ptr"):
        _one_does_not_ask_kernel[(3,)](torch.zeros(1), torch.zeros(1, dtype=torch.int32))


def test_elements_that_no_launch_has_stored_are_counted() -> None:
    x = torch.arange(32.0)
    with interpreted() as memory:
        y = torch.empty(40, dtype=torch.bfloat16)
        assert memory.unwritten(y) == 40
        _copy_kernel[(2,)](x, y, 25, 16, BLOCK=16)
        assert memory.unwritten(y) == 15
        _copy_kernel[(1,)](x, y[30:], 3, 0, BLOCK=16)
    assert memory.unwritten(y) == 12
    assert memory.unwritten(y[:25]) == memory.unwritten(y[30:33]) == 0
    assert memory.unwritten(y[25:30]) == 5
    assert memory.unwritten(y.view(5, 8)[:, ::2]) == 5
    assert memory.unwritten(x) == 32
    assert memory.unwritten(torch.empty(3)) == 3


def test_an_element_written_in_part_is_unwritten() -> None:
    with interpreted() as memory:
        y = torch.empty(2)
        _store_as_kernel[(1,)](y, tl.int8)
        assert memory.unwritten(y) == 2
        _store_as_kernel[(1,)](y, tl.float32)
        assert memory.unwritten(y) == 1


def test_memory_of_one_launch_is_not_taken_for_that_of_the_next() -> None:
    x = torch.arange(1024.0)
    with interpreted() as memory:
        for _ in range(8):
            y = torch.empty(1024)
            assert memory.unwritten(y) == 1024
            _copy_kernel[(1,)](x, y, 1024, 0, BLOCK=1024)
