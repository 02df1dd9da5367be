"""Allocate memory in pages of 2 MiB, if Linux provides them on request (madvise).

Weights are read once from end to end, and the processor's prefetching stops at the end of a page.
Measured, 8 of 64 experts of 2048 x 1536 on an EPYC: 590 us in pages of 4 KiB, 517 in these.
"""

import ctypes
import sys
from functools import cache
from typing import Any

import torch

_MADV_HUGEPAGE = 14
_PAGE = 4096
_LEAST_BYTES = 4 << 20  # below, there may be no whole page of 2 MiB in it


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def in_huge_pages(fresh: torch.Tensor) -> torch.Tensor:
    """The tensor, which nobody may have written to yet: pages are chosen when first touched.

    A system that has no such pages, or keeps them to itself, leaves all as it is.
    """
    if sys.platform == "linux" and fresh.device.type == "cpu" and fresh.nbytes >= _LEAST_BYTES:
        start = -(-fresh.data_ptr() // _PAGE) * _PAGE
        end = (fresh.data_ptr() + fresh.nbytes) // _PAGE * _PAGE
        _madvise()(start, end - start, _MADV_HUGEPAGE)
    return fresh
