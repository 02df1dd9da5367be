"""What a result must say of itself to be quoted: machine, versions, code and command."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from fqcompile.kernels.gpu import gpu_of
from fqcompile.kernels.tuning.key import fingerprint, kernel_source_hash

COMMIT_VARIABLE = "BENCH_COMMIT"
_ROOT = Path(__file__).parents[2]


def identity(device: torch.device) -> dict[str, str]:
    """Where and with what this process measures; "kernels" is a digest of the kernels' source."""
    about = {
        "device": device_name(device),
        "commit": commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        about |= fingerprint(gpu_of(device), kernel_source_hash())
    return about


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return gpu_of(device).name
    known = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", known.read_text()) if known.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as that of a folder: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of the checkout, with "+" where files differ from it.

    A copy without its history has none: there BENCH_COMMIT says it, set by who made the copy.
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
