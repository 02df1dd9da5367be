"""The directory of what fqcompile keeps between processes, and a lock for those who write there."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def cache_directory() -> Path:
    """$FQCOMPILE_CACHE_DIR, else "fqcompile" in $XDG_CACHE_HOME or ~/.cache."""
    own, shared = os.environ.get("FQCOMPILE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    home = os.path.expanduser("~")
    if not shared and home == "~":  # a user whom the system does not know
        return Path(tempfile.gettempdir()) / "fqcompile"
    return Path(shared or os.path.join(home, ".cache")) / "fqcompile"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its holder, however that ends."""
    with path.open("a") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
