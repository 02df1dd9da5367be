"""Tensors against a page that nothing may touch: a read or a write beyond them is a crash."""

import ctypes
import mmap

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def at_end_of_page(t: Tensor) -> Tensor:
    """A copy of t whose last element is the last of a page, before one without any access."""
    whole = -(-max(1, t.nbytes) // _PAGE) * _PAGE
    memory = mmap.mmap(-1, whole + _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(start + whole, _PAGE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    view = torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=whole - t.nbytes)
    return view.view(t.dtype).view(t.shape).copy_(t)


def at_start_of_page(t: Tensor) -> Tensor:
    """The same with the first element as the first of a page, after one without any access."""
    whole = -(-max(1, t.nbytes) // _PAGE) * _PAGE
    memory = mmap.mmap(-1, whole + _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(start, _PAGE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    view = torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=_PAGE)
    return view.view(t.dtype).view(t.shape).copy_(t)
