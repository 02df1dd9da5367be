"""One quantised weight in a safetensors file, which is believed only if all of it is as written.

qweight, scale   the plain layout, which no machine is bound to
__metadata__     plan: how the weight was quantised, as JSON
                 digest: SHA-256 over the key, the plan, and the types, shapes and bytes of both
"""

import json
import struct
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import CorruptEntry
from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.quant.choose import QuantPlan
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.content_digest import bytes_of, content_digest

Entry = tuple[QuantPlan, QuantizedTensor]

HEADER_BYTES = 1 << 16  # more than any header has: 25 for the error of each of 2,000 experts
_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CORRUPT = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError,
    struct.error,
)  # fmt: skip


def encoded(key: str, entry: Entry) -> list[memoryview]:
    """The pieces of the file with this weight, which is on a CPU, for who asks for `key`."""
    plan, weight = entry
    about = {**vars(plan), "scale_dtype": _name(plan.scale_dtype), "k": weight.k}
    text = json.dumps(about)
    qweight, scale = weight.as_rows()
    tensors = {"scale": scale.contiguous(), "qweight": qweight.contiguous()}
    digest = _digest(key, text, tensors["qweight"], tensors["scale"])
    header: dict[str, object] = {"__metadata__": {"plan": text, "digest": digest}}
    pieces, end = [], 0
    # The wider type first, so that each value lies on a multiple of its size.
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        pieces.append(bytes_of(tensor))
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return [memoryview(struct.pack("<Q", len(content)) + content), *pieces]


def read_entry(path: Path, key: str) -> Entry:
    """The weight that was written for `key`, in memory of its own.

    Raises:
        CorruptEntry: the file is cut off, changed, or was written for another key.
        OSError: it cannot be read, or is not there.
    """
    try:
        with path.open("rb") as file:
            metadata, qweight, scale = _read(file)
        text = metadata["plan"]
        if metadata["digest"] != _digest(key, text, qweight, scale):
            raise CorruptEntry("its digest is that of other content")
        return _entry(json.loads(text), qweight, scale)
    except _CORRUPT as error:
        raise CorruptEntry(f"{path}: {type(error).__name__}: {error}") from error


def _read(file: BufferedReader) -> tuple[dict[str, str], Tensor, Tensor]:
    """As the file says of itself, unchecked; nothing is mapped, for mapped files may shrink."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > HEADER_BYTES:
        raise CorruptEntry(f"its header has {length} bytes, at most {HEADER_BYTES} are written")
    header = json.loads(file.read(length))
    qweight, scale = (_tensor(file, 8 + length, header[name]) for name in ("qweight", "scale"))
    return header["__metadata__"], qweight, scale


def _tensor(file: BufferedReader, start: int, about: dict[str, Any]) -> Tensor:
    dtype = _DTYPES[about["dtype"]]
    tensor = in_huge_pages(torch.empty(about["shape"], dtype=dtype, device="cpu"))
    # Any place may be read: the digest decides whether it was the right one.
    file.seek(start + abs(about["data_offsets"][0]))
    size = file.readinto(bytes_of(tensor))
    if size != tensor.nbytes:
        raise CorruptEntry(f"it ends {tensor.nbytes - size} bytes too early")
    return tensor


def _digest(key: str, plan: str, qweight: Tensor, scale: Tensor) -> str:
    parts = [key, plan, content_digest(qweight), content_digest(scale)]
    return sha256("\0".join(parts).encode()).hexdigest()


def _entry(about: dict[str, Any], qweight: Tensor, scale: Tensor) -> Entry:
    k = about.pop("k")
    about["scale_dtype"] = getattr(torch, about["scale_dtype"])
    about["expert_errors"] = tuple(about["expert_errors"])
    plan = QuantPlan(**about)
    experts = len(plan.expert_errors)
    rows = qweight.shape[0] // max(1, experts)
    form = Format(plan.bits, plan.group_size, rows, k, experts, scale_method=plan.scale_method)
    return plan, QuantizedTensor.of_rows(qweight, scale, form)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
