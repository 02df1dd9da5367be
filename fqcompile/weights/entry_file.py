"""One quantized weight in a safetensors file, which is used only if its digest matches.

qweight, scale   the plain layout, which does not depend on the machine
__metadata__     plan: how the weight was quantized, as JSON
                 digest: SHA-256 over the key, the plan, and the types, shapes and bytes of both
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import CorruptEntry
from fqcompile.files.replace import Piece
from fqcompile.files.safetensors_file import (
    DTYPE_NAMES,
    bytes_of,
    consecutive,
    encode_header,
    read_header,
    read_tensor,
)
from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.quant.choose import QuantPlan
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.fingerprint import content_digest

Entry = tuple[QuantPlan, QuantizedTensor]

_CORRUPT = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError
)  # fmt: skip


def encoded(key: str, entry: Entry) -> list[Piece]:
    """The pieces of the file with this weight, which is on a CPU, for requests of `key`."""
    plan, weight = entry
    about = {**vars(plan), "scale_dtype": _name(plan.scale_dtype), "k": weight.k}
    text = json.dumps(about)
    # The wider type first, so that each value lies on a multiple of its size.
    qweight, scale = weight.as_rows()
    tensors = {"scale": scale.contiguous(), "qweight": qweight.contiguous()}
    digest = _digest(key, text, tensors["qweight"], tensors["scale"])
    forms = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    header = encode_header(consecutive(forms), {"plan": text, "digest": digest})
    return [header, *map(bytes_of, tensors.values())]


def read_entry(path: Path, key: str) -> Entry:
    """The weight that was written for `key`, in memory of its own.

    Raises:
        CorruptEntry: the file is cut off, changed, or was written for another key.
        OSError: it cannot be read, or is not there.
    """
    try:
        places, metadata = read_header(path)
        qweight, scale = (read_tensor(places[name], in_huge_pages) for name in ("qweight", "scale"))
        text = metadata["plan"]
        if metadata["digest"] != _digest(key, text, qweight, scale):
            raise CorruptEntry("its digest is that of other content")
        return _entry(json.loads(text), qweight, scale)
    except _CORRUPT as error:
        raise CorruptEntry(f"{path}: {type(error).__name__}: {error}") from error


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
    form = Format(
        plan.bits, plan.group_size, rows, k, experts,
        scale_method=plan.scale_method, levels=plan.levels,
    )  # fmt: skip
    return plan, QuantizedTensor.of_rows(qweight, scale, form)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
