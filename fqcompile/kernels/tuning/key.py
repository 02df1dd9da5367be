"""The scope of a measured configuration: the matmul, a bucket of M, the machine and versions.

Layers of one shape share a key, whatever their names, bias, activation or residual.
"""

import re
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import torch

from fqcompile.kernels.epilogue import HAS_TRITON
from fqcompile.kernels.spec import GemmSpec, Gpu

# A bucket is named by its largest M, at which it is measured; the last one, None, is open.
Bucket = int | None
# The buckets at which one configuration is measured: its own, or the first and the last number of
# rows that it serves, which then need be none of those below.
Ends = tuple[Bucket, ...]
M_BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
_OPEN_ROWS = 2048
# Rows sorted by expert number the tokens of a prompt times the experts per token.
GROUPED_BUCKETS = (*M_BUCKETS, 2048, 8192)
_OPEN_GROUPED_ROWS = 32768
_TRITON_SOURCE = Path(__file__).parent.parent / "triton"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def buckets(spec: GemmSpec) -> tuple[int, ...]:
    """The bounds of the spec's buckets of M."""
    return GROUPED_BUCKETS if spec.routing == "grouped" else M_BUCKETS


def bucket_of(m: int, spec: GemmSpec) -> Bucket:
    """The bucket that `m` rows fall in."""
    return next((bound for bound in buckets(spec) if m <= bound), None)


def rows_of(bucket: Bucket, spec: GemmSpec) -> int:
    """The number of rows at which a bucket is measured: its largest M.

    For the open bucket, which has none: 2048, or 32768 for rows grouped by expert.
    """
    if bucket is not None:
        return bucket
    return _OPEN_GROUPED_ROWS if spec.routing == "grouped" else _OPEN_ROWS


def bucket_name(bucket: Bucket, spec: GemmSpec) -> str:
    """A label for reports: "M <= 16", "M > 512" for the open bucket, "M = 17" for an end."""
    if bucket is None:
        return f"M > {buckets(spec)[-1]}"
    return f"M {'<=' if bucket in buckets(spec) else '='} {bucket}"


def tuning_key(spec: GemmSpec, layout_name: str) -> str:
    """The matmul as text, e.g. "dense sm_90/132 4096x14336 int4 g128 bfloat16 ... plain".

    For experts it begins with "experts=128 grouped" instead of "dense".
    """
    assert spec.gpu is not None
    parts = (
        f"experts={spec.experts} {spec.routing}" if spec.experts else "dense",
        f"{spec.gpu.arch}/{spec.gpu.num_sms}",
        f"{spec.n}x{spec.k}",
        spec.qtype.name,
        f"g{spec.group_size}",
        _name(spec.dtype),
        f"scale:{_name(spec.scale_dtype)}",
        layout_name,
        "gated" if spec.gated else "plain",
    )
    return " ".join(parts)


def fingerprint(gpu: Gpu, source_hash: str) -> dict[str, str]:
    """The facts besides the key that must be unchanged for a measurement to be valid."""
    return {
        "gpu": gpu.name,
        "sms": str(gpu.num_sms),
        "driver": _driver(),
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "kernels": source_hash,
    }


@cache
def kernel_source_hash() -> str:
    """A digest of the Triton kernels' source: an edit there invalidates every tuned table."""
    digest = sha256()
    for path in sorted(_TRITON_SOURCE.rglob("*.py")):
        digest.update(path.relative_to(_TRITON_SOURCE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _triton_version() -> str:
    if not HAS_TRITON:
        return "none"
    return str(import_module("triton").__version__)


@cache
def _driver() -> str:
    """NVIDIA's driver version; "unknown" if the system does not report it."""
    if not _NVIDIA_DRIVER.exists():
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _NVIDIA_DRIVER.read_text())
    return found.group() if found else "unknown"
