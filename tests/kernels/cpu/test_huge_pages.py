"""Packed weights ask for large pages; the values are those of any other memory."""

import copy
import errno
import mmap
import pickle
import re
import sys
import weakref
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.kernels.cpu import huge_pages
from fqcompile.kernels.cpu.huge_pages import beside_others, in_huge_pages

_KNOWN = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()


def _asked_for(t: torch.Tensor) -> bool:
    """Whether the mapping in the middle of the tensor is marked for large pages."""
    middle, inside = t.data_ptr() + t.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            start, end = (int(side, 16) for side in bounds.groups())
            inside = start <= middle < end
        elif inside and line.startswith("VmFlags"):
            return " hg" in line
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.skipif(not _KNOWN, reason="this system has no transparent large pages")
def test_a_large_tensor_asks_for_large_pages() -> None:
    """Whether it gets them is up to the system, and to how scattered its free memory is."""
    assert _asked_for(in_huge_pages(torch.empty(64 << 20, dtype=torch.uint8)))


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20])
def test_small_fresh_tensors_are_left_alone(nbytes: int) -> None:
    t = torch.empty(nbytes, dtype=torch.uint8)
    assert in_huge_pages(t) is t


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors stay where they are")
def test_a_large_tensor_begins_with_a_page_that_nobody_has_used() -> None:
    """malloc hands out again what was freed, in the pages that it had."""
    used = torch.full((5 << 20,), 7, dtype=torch.uint8)
    fresh = torch.empty(3, 2 << 20, dtype=torch.bfloat16)
    t = in_huge_pages(fresh)
    assert (t.shape, t.dtype, t.stride()) == (fresh.shape, fresh.dtype, fresh.stride())
    assert t.data_ptr() % (2 << 20) == 0 and not bool(t.any())
    assert t.untyped_storage().nbytes() == t.nbytes
    t.fill_(3)
    assert int(t.float().sum()) == 3 * t.numel() and bool((used == 7).all())


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    t = torch.empty(8 << 20, dtype=torch.uint8)
    assert in_huge_pages(t) is t
    meta = torch.empty(8 << 20, device="meta")
    assert in_huge_pages(meta) is meta


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors stay where they are")
@pytest.mark.skipif(not _KNOWN, reason="this system has no transparent large pages")
def _refuse(*_: object, **__: object) -> Any:
    raise OSError(errno.EINVAL, "Invalid argument")


class _KernelWithoutLargePages(mmap.mmap):
    """madvise(2): EINVAL, advice is MADV_HUGEPAGE, but the kernel was not configured with them."""

    madvise = _refuse


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors stay where they are")
def test_a_kernel_without_large_pages_gives_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_chunks", weakref.WeakSet())
    monkeypatch.setattr(mmap, "mmap", _KernelWithoutLargePages)
    small, large = torch.randn(1000), torch.empty(2 << 20)
    copied, fresh = beside_others(small), in_huge_pages(large)
    assert torch.equal(copied, small) and copied.data_ptr() != small.data_ptr()
    assert fresh.shape == large.shape and fresh.data_ptr() != large.data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors stay where they are")
def test_what_may_not_be_mapped_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_chunks", weakref.WeakSet())
    monkeypatch.setattr(mmap, "mmap", _refuse)
    small, large = torch.randn(1000), torch.empty(2 << 20)
    assert beside_others(small) is small and in_huge_pages(large) is large


def test_small_tensors_lie_one_behind_the_other_in_large_pages() -> None:
    given = [torch.full((n,), n, dtype=torch.int32) for n in (1000, 3, 70_000)]
    moved = [beside_others(t) for t in given]
    assert all(map(torch.equal, given, moved))
    assert all(_asked_for(t) for t in moved)
    assert all(t.data_ptr() % 64 == 0 for t in moved)
    assert [t.untyped_storage().nbytes() for t in moved] == [t.nbytes for t in given]
    assert moved[0].data_ptr() < moved[1].data_ptr() < moved[2].data_ptr()
    assert moved[2].data_ptr() - moved[0].data_ptr() < 4096 + 2 * 64
    for t in moved:  # none overlaps another
        t.fill_(7)
    assert [int(t.sum()) for t in moved] == [7 * t.numel() for t in given]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors stay where they are")
def test_the_place_of_a_dead_tensor_is_used_again_when_no_view_shows_it() -> None:
    neighbor, first = (beside_others(torch.arange(12_347)) for _ in range(2))
    place, view = first.data_ptr(), first[5:]
    del first
    second = beside_others(torch.arange(12_347))
    assert second.data_ptr() != place and int(view[0]) == 5
    del view
    assert beside_others(torch.arange(12_347)).data_ptr() == place
    assert torch.equal(neighbor, second)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors stay where they are")
def test_memory_is_returned_with_its_last_tensor() -> None:
    before = set(huge_pages._chunks)
    many = [beside_others(torch.ones(500_000)) for _ in range(40)]
    made = set(huge_pages._chunks) - before
    assert len(made) >= 2
    del made
    many.clear()
    assert len(huge_pages._chunks) <= len(before)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.randoms())
def test_tensors_that_come_and_go_never_share_a_place(sizes: list[int], random: Random) -> None:
    living: list[tuple[torch.Tensor, int]] = []
    for number, size in enumerate(sizes):
        living.append((beside_others(torch.full((size,), number)), number))
        if random.random() < 0.4:
            living.pop(random.randrange(len(living)))
    assert all(bool((t == number).all()) for t, number in living)


def test_copies_and_files_of_such_a_tensor_are_of_it_alone(tmp_path: Path) -> None:
    beside_others(torch.ones(5000))
    t = beside_others(torch.arange(1000))
    torch.save(t, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 3 * t.nbytes
    assert torch.equal(torch.load(tmp_path / "file"), t)
    assert torch.equal(copy.deepcopy(t), t)
    assert torch.equal(pickle.loads(pickle.dumps(t)), t)


@pytest.mark.parametrize(
    "kept", [torch.empty(0), torch.empty(2 << 20), torch.empty(9, device="meta")]
)
def test_others_stay_where_they_are(kept: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert beside_others(kept) is kept
    monkeypatch.setattr(sys, "platform", "darwin")
    small = torch.ones(9)
    assert beside_others(small) is small
