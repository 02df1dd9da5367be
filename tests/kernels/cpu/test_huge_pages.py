"""Large packed weights ask for large pages; the values are those of any other memory."""

import re
import sys
from pathlib import Path

import pytest
import torch

from fqcompile.kernels.cpu.huge_pages import in_huge_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LENT = _SETTING.exists() and "[never]" not in _SETTING.read_text()


def _huge_kib(t: torch.Tensor) -> int:
    """Of the mappings that hold the tensor, what lies in large pages."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            start, end = (int(side, 16) for side in bounds.groups())
            inside = start < t.data_ptr() + t.nbytes and t.data_ptr() < end
        elif inside and line.startswith("AnonHugePages"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(not _LENT, reason="this system lends no large pages")
def test_a_large_tensor_lies_in_large_pages() -> None:
    t = in_huge_pages(torch.empty(32 << 20, dtype=torch.uint8)).fill_(1)
    assert _huge_kib(t) > 16 << 10


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20, 5 << 20])
def test_values_are_kept_and_small_tensors_left_alone(nbytes: int) -> None:
    t = torch.empty(nbytes, dtype=torch.uint8)
    assert in_huge_pages(t) is t
    assert int(t.fill_(7).sum(dtype=torch.int64)) == 7 * nbytes


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    t = torch.empty(8 << 20, dtype=torch.uint8)
    assert in_huge_pages(t) is t
    meta = torch.empty(8 << 20, device="meta")
    assert in_huge_pages(meta) is meta
