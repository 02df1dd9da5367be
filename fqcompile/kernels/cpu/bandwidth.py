"""How fast this machine reads memory: what bounds a kernel for few rows of x."""

import time
from functools import cache

import torch

_BYTES = 128 << 20  # more than the caches of most processors
_READS = 4


def read_bandwidth() -> float:
    """Bytes a second at which PyTorch's threads read memory; measured once, in 0.1 s."""
    return _measured(torch.get_num_threads())


@cache
def _measured(threads: int) -> float:
    """The best of a few sums, the fastest reader in PyTorch, over a tensor that no cache holds."""
    numbers = torch.ones(_BYTES // 4)
    seconds = []
    for _ in range(_READS):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return _BYTES / min(seconds)
