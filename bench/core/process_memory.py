"""What this process holds of the machine's memory, as Linux counts it."""

import ctypes
import gc
from pathlib import Path


def resident() -> int:
    """Bytes in memory now, mapped files included."""
    return _status("VmRSS")


def anonymous() -> int:
    """Bytes in memory now that no file backs: what the system cannot drop and read again."""
    return _status("RssAnon")


def peak() -> int:
    """The most that was resident since the last `reset_peak`, or since the process began."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Give back what is garbage, and what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
