"""Large packed weights ask for large pages; the values are those of any other memory."""

import re
import sys
from pathlib import Path

import pytest
import torch

from fqcompile.kernels.cpu import huge_pages
from fqcompile.kernels.cpu.huge_pages import in_huge_pages

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


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20, 5 << 20])
def test_values_are_kept_and_small_tensors_left_alone(nbytes: int) -> None:
    t = torch.empty(nbytes, dtype=torch.uint8)
    assert in_huge_pages(t) is t
    assert int(t.fill_(7).sum(dtype=torch.int64)) == 7 * nbytes


def test_whole_pages_inside_the_tensor_alone_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *a: asked.append(a))
    whole = torch.empty(8 << 20, dtype=torch.uint8)
    t = in_huge_pages(whole[100:-100])
    in_huge_pages(whole[: 1 << 20])
    ((start, length, advice),) = asked
    assert advice == 14 and start % 4096 == length % 4096 == 0
    assert t.data_ptr() <= start and start + length <= t.data_ptr() + t.nbytes
    assert length > t.nbytes - 2 * 4096


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    t = torch.empty(8 << 20, dtype=torch.uint8)
    assert in_huge_pages(t) is t
    meta = torch.empty(8 << 20, device="meta")
    assert in_huge_pages(meta) is meta
