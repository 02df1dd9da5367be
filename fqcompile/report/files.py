"""Writing text so that a reader sees the old file or the new one, never half of one."""

import os
import threading
from pathlib import Path


def replace_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path`, making its folders, and return the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A rename is atomic only within one file system, hence a neighbour and not the system's tmp.
    part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        # What has no place in UTF-8, as half a surrogate pair in a name, is spelt out.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target
