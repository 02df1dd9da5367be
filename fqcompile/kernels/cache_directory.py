"""The directory of what fqcompile keeps between processes."""

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """$FQCOMPILE_CACHE_DIR, else "fqcompile" in $XDG_CACHE_HOME or ~/.cache."""
    own, shared = os.environ.get("FQCOMPILE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    home = os.path.expanduser("~")
    if not shared and home == "~":  # a user whom the system does not know
        return Path(tempfile.gettempdir()) / "fqcompile"
    return Path(shared or os.path.join(home, ".cache")) / "fqcompile"
