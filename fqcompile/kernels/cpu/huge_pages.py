"""Memory in pages of 2 MiB, if Linux provides them on request (madvise), for what is read often.

Weights are read once from end to end. In pages of 4 KiB the processor's prefetching stops at the
end of each, and looking up where the next one lies takes as long as reading it, the more so in a
virtual machine. Measured on an EPYC, 72 int4 matrices of 0.35 to 1.4 MB, one row, one thread: 18
GB/s in pages of 4 KiB, 29 in these; plain loads read 16 and 34.

malloc's memory will not do. What it hands out below 32 MiB may have been touched before, in small
pages, and begins anywhere in a large one.
"""

import ctypes
import mmap
import sys
import weakref
from contextlib import suppress
from threading import RLock
from typing import Any

import torch

from fqcompile.locks import fork_safe

_LARGE_PAGE = 2 << 20
_LEAST_BYTES = 2 * _LARGE_PAGE  # of what gets pages of its own
_CHUNK_BYTES = 32 << 20  # of which no more becomes memory than is used
_ALIGNMENT = 64  # a line of the caches


class _Chunk:
    """Large pages that tensors share, one behind the other; it lives as long as one of them.

    The place of a tensor that died is taken by the next of its size: a weight that is packed again.
    A system that has no such pages, or keeps them to itself, gives others.
    """

    def __init__(self, nbytes: int) -> None:
        # Never what malloc has: pages are chosen when first touched, and its may be used ones.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, nbytes + _LARGE_PAGE, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel that was built without them refuses
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.next = -address % _LARGE_PAGE
        self.end = self.next + nbytes
        self.free: dict[int, list[int]] = {}

    def take(self, nbytes: int) -> Any | None:
        """So many bytes, free again when the last reference to them goes; None: there are not."""
        again = self.free.get(nbytes)
        if again:
            start = again.pop()
        elif self.next + nbytes <= self.end:
            start = self.next
            self.next += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        else:
            return None
        taken = (ctypes.c_char * nbytes).from_buffer(self.memory, start)
        weakref.finalize(taken, self._give_back, nbytes, start).atexit = False
        return taken

    def _give_back(self, nbytes: int, start: int) -> None:
        """Without a lock: the last reference may go anywhere, also where others are held."""
        self.free.setdefault(nbytes, []).append(start)


_chunks: weakref.WeakSet[_Chunk] = weakref.WeakSet()
_lock = fork_safe(RLock())


def _mapped(nbytes: int) -> _Chunk | None:
    """None where the process may not map so much, as by `ulimit -v`: malloc's memory will do."""
    try:
        return _Chunk(nbytes)
    except OSError:
        return None


def _taken(nbytes: int) -> Any | None:
    with _lock:
        for chunk in _chunks:
            taken = chunk.take(nbytes)
            if taken is not None:
                return taken
        if (fresh := _mapped(_CHUNK_BYTES)) is None:
            return None
        _chunks.add(fresh)
        return fresh.take(nbytes)


def _has_place(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    return sys.platform == "linux" and plain and tensor.nbytes > 0


def in_huge_pages(fresh: torch.Tensor) -> torch.Tensor:
    """A tensor like this one, which has no values yet, in large pages of its own.

    One that is too small, not on a CPU, not on Linux or more than may be mapped is returned itself.
    """
    if not _has_place(fresh) or fresh.nbytes < _LEAST_BYTES:
        return fresh
    if (chunk := _mapped(fresh.nbytes)) is None:
        return fresh
    memory = torch.frombuffer(chunk.take(fresh.nbytes), dtype=fresh.dtype)
    return memory.view(fresh.shape)


def beside_others(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in large pages that small tensors share, in the order of these calls.

    What is large enough for pages of its own, not on a CPU, not on Linux or more than may be mapped
    is returned as it is.
    """
    if not _has_place(tensor) or tensor.nbytes >= _LEAST_BYTES:
        return tensor
    if (taken := _taken(tensor.nbytes)) is None:
        return tensor
    memory = torch.frombuffer(taken, dtype=tensor.dtype)
    return memory.view(tensor.shape).copy_(tensor)
