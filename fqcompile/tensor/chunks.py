"""Process a matrix in pieces of whole rows that fit the CPU cache, without autograd."""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch
from torch.nn.functional import pad

from fqcompile.tensor.format import num_groups
from fqcompile.torch_compat import library_path

# Weights in a piece. On a CPU some copies of it should fit the L2 cache (measured with 1 MiB per
# core); elsewhere a launch should be worth its overhead.
_CPU_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 21
# Operations this short keep no more threads busy: each start needs the interpreter lock.
_MOST_WORKERS = 8

T = TypeVar("T")


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No graph is recorded, and results are ordinary tensors even in a caller's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def row_chunks(w: torch.Tensor, share: float = 1.0) -> Iterator[slice]:
    """Slices that cover the rows of w [N, K]; `share` makes pieces larger or smaller than usual."""
    n, k = w.shape
    elements = _CPU_CHUNK if w.device.type == "cpu" else _GPU_CHUNK
    rows = max(1, int(elements * share) // max(1, k))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def each_chunk(task: Callable[[slice], T], w: torch.Tensor, share: float = 1.0) -> list[T]:
    """`task(rows)` for each piece of w, several at a time; results in the order of rows.

    One thread per piece, not all threads on each operation: those meet after every 10 us of work,
    and where another process holds one of the cores that costs a time slice each (measured: 20x).
    A tensor of a kind of its own, as while a graph is traced, is known to the calling thread alone,
    and pieces would make the graph long.
    """
    plain = type(w) in (torch.Tensor, torch.nn.Parameter)
    chunks = list(row_chunks(w, share)) if plain else [slice(0, len(w))]
    workers = min(torch.get_num_threads(), _MOST_WORKERS)
    alone = workers == 1 or len(chunks) == 1 or w.device.type != "cpu"
    pool = None if alone else _pool(workers)
    if pool is None:
        with plain_tensors():
            return [task(rows) for rows in chunks]
    return list(pool.map(plain_tensors()(task), chunks))


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor | None:
    """Threads whose operations do not split further; None where PyTorch cannot be told so."""
    pool = ThreadPoolExecutor(workers, "fqcompile", _use_one_thread)
    if pool.submit(torch.get_num_threads).result() == 1:
        return pool
    pool.shutdown()
    return None


def _use_one_thread() -> None:
    """Set the number for this thread only: `torch.set_num_threads` also sets it for new threads."""
    # A thread takes over the process's number when first asked, whatever was set on it before.
    torch.get_num_threads()
    # OpenMP as the linker finds it for PyTorch: in what is loaded for all, or in what that needs.
    for library in map(ctypes.CDLL, (None, library_path)):
        if torch.get_num_threads() > 1 and hasattr(library, "omp_set_num_threads"):
            library.omp_set_num_threads(1)


# A forked child has the pool but not its threads, and would wait for them forever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def halving_sum(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Sums over `dim`, added in an order that depends on its length alone.

    By halves, the first of which is the larger power of two: x[0] + x[4], x[1] + x[5], ... of
    eight. Neither threads nor devices nor other rows change a bit, and C++ can do the same.
    """
    while (count := x.shape[dim]) > 1:
        half = 1 << ((count - 1).bit_length() - 1)
        second = x.narrow(dim, half, count - half)
        sums = x.narrow(dim, 0, count - half) + second
        rest = x.narrow(dim, count - half, 2 * half - count)
        x = torch.cat([sums, rest], dim) if rest.shape[dim] else sums
    return x.squeeze(dim)


def grouped(w: torch.Tensor, group_size: int) -> torch.Tensor:
    """w [N, K] as float32 groups [N, G, group_size]; zeros fill up a short last group.

    A zero is code 0 under every scale, so it changes neither extremes nor errors nor fits.
    """
    n, k = w.shape
    groups = num_groups(k, group_size)
    rows = pad(w.float(), (0, groups * group_size - k)) if k % group_size else w.float()
    # Contiguous, so that sums run in the same order whatever the layout of w.
    return rows.contiguous().view(n, groups, group_size)


def group_parts(
    values: torch.Tensor, scale: torch.Tensor, group_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of values [N, K] beside their scales, broadcastable: whole groups, then a short one."""
    n, k = values.shape
    whole = k // group_size
    split = whole * group_size
    if whole:
        yield values[:, :split].view(n, whole, group_size), scale[:, :whole, None]
    if split < k:
        yield values[:, split:], scale[:, whole:]
