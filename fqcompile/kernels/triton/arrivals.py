"""Where programs that split K meet: their shares, and a counter of arrivals for each tile.

A counter is 0 before a launch, and the last program of its tile sets it back to 0. So nothing has
to fill it for a launch, which would take as long as the kernel that it saves, if only no two
launches that may run at the same time ever count on the same one:

* Launches into one stream run one after the other, and each stream has its own counters. A launch
  that starts early waits for the one before it before it stores (rule 1 of `dependent_launch`).
* What a CUDA graph captures is replayed into any stream, beside anything. Each captured launch gets
  counters of its own, forever: nothing tells when a graph ends. No graph runs beside itself: "each
  launch is ordered behind any previous launches" of it (CUDA Runtime API, `cudaGraphLaunch`).
* Shares come from PyTorch's allocator as all memory of one call does, which answers for as much.

A launch that fails to start has counted nothing; one that fails as it runs takes the device along.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from triton.runtime import driver

from fqcompile.locks import fork_safe

CHUNK = 1 << 16  # counters made at once: 256 KiB, for some 500 captured launches
_OF_A_STREAM = 1 << 10
_LINE = 32  # counters in a line of the cache, which no two launches share
_lock = fork_safe(threading.RLock())


class _Counters:
    """Of one device: those of each stream, those that nobody has been given, and all of them, since
    nothing else holds what a captured launch was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, torch.Tensor] = {}
        self.left = torch.empty(0, dtype=torch.int32)
        self.made: list[torch.Tensor] = []

    def take(self, number: int) -> torch.Tensor | None:
        """Zeros that nobody else will get; None if there are no longer that many."""
        number = -(-number // _LINE) * _LINE
        with _lock:
            taken, left = self.left[:number], self.left[number:]
            if taken.numel() < number:
                return None
            self.left = left
        return taken

    def keep_in_stock(self, number: int) -> None:
        """Make more if fewer are left, in a thread of its own: PyTorch may put what this thread
        allocates into a graph's memory. They are zero on return: no user waits for a stream."""
        with _lock:
            if self.left.numel() < number:
                with ThreadPoolExecutor(1) as other:
                    self.left = other.submit(_zeros, max(number, CHUNK), self.device).result()
                self.made.append(self.left)

    def give(self, stream: int, number: int) -> torch.Tensor:
        """The counters of a stream from now on."""
        with _lock:
            self.keep_in_stock(number + _LINE)
            given = self.take(number)
            assert given is not None, "they are in stock"
            self.of_stream[stream] = given
        return given


def _zeros(number: int, device: torch.device) -> torch.Tensor:
    zeros = torch.zeros(number, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return zeros


_of_device: dict[torch.device, _Counters] = {}


def counters(x: torch.Tensor, number: int) -> torch.Tensor:
    """int32 [at least `number`], all 0, for the next launch into the current stream of x's device.

    A capture that finds none left takes memory of its graph, which fills it in every replay.
    """
    device, on_gpu = x.device, x.is_cuda  # `device.type` would take 0.2 us
    own = _of_device.get(device) or _of_device.setdefault(device, _Counters(device))
    if on_gpu and torch.cuda.is_current_stream_capturing():
        taken = own.take(number)
        return x.new_zeros(number, dtype=torch.int32) if taken is None else taken
    # The stream that Triton launches into.
    stream = driver.active.get_current_stream(device.index) if on_gpu else 0
    found = own.of_stream.get(stream)
    if found is None or found.numel() < number:
        found = own.give(stream, max(number, _OF_A_STREAM))
    if own.left.numel() < CHUNK // 2:
        own.keep_in_stock(CHUNK // 2)  # for captures to come
    return found


def meeting_place(
    x: torch.Tensor, shares: tuple[int, int, int], tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel arguments: shares, fp32 [SPLIT_K, M, rows of the weight], and the tiles' counters."""
    return x.new_empty(shares, dtype=torch.float32), counters(x, tiles)
