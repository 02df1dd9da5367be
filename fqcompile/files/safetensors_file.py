"""The safetensors format: eight bytes of length, a header of JSON, then the tensors' bytes.

    [u64 length] {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} [bytes]

Implemented here instead of using the library, to control when data is synced to disk, and to read
a checkpoint without mapping all of it. Used for saved models, exports, foreign checkpoints and the
cache of quantized weights.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fqcompile.errors import CheckpointError
from fqcompile.files.untrusted import LARGEST, check_name, parse_json, shown

# Tensors start at multiples of it if their sizes allow: compiled graphs copy unaligned tensors.
ALIGNMENT = 64
_MOST_DIMENSIONS, _MOST_NUMBERS = 64, 2**63 - 1  # that PyTorch has
_METADATA, PT = "__metadata__", {"format": "pt"}
Shape = tuple[int, ...]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file: `start` and `end` are bytes of the file."""

    path: Path
    dtype: str
    shape: Shape
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Header(NamedTuple):
    """The tensors by name; `metadata` is unchecked, None where there is none."""

    tensors: dict[str, TensorPlace]
    metadata: Any


def bytes_of(w: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which stays alive as long as the result."""
    flat = w.detach().as_strided((w.numel(),), (1,))  # a view of one value may have any stride
    return flat.view(torch.uint8).numpy().data


def byte_size(dtype: str, shape: Shape) -> int:
    """Size in bytes of a tensor of that dtype and shape."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def is_shape(shape: Sequence[int]) -> bool:
    """Whether PyTorch can have a tensor of that shape, without values too."""
    return len(shape) <= _MOST_DIMENSIONS and math.prod(n or 1 for n in shape) <= _MOST_NUMBERS


def consecutive(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, tuple[str, Shape, int]]:
    """{name: (dtype, shape, start)} of tensors {name: (dtype, shape)} one after the other."""
    placed, start = {}, 0
    for name, (dtype, shape) in tensors.items():
        placed[name] = (dtype, shape, start)
        start += byte_size(dtype, shape)
    return placed


def encode_header(
    tensors: Mapping[str, tuple[str, Shape, int]], metadata: Mapping[str, str] = PT
) -> bytes:
    """Length and header of {name: (dtype, shape, start)}, padded so that the data is aligned."""
    entries: dict[str, Any] = {_METADATA: metadata}
    for name, (dtype, shape, start) in tensors.items():
        offsets = [start, start + byte_size(dtype, shape)]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> Header:
    """Read the header of an untrusted file.

    Raises:
        CheckpointError: it is not a complete safetensors file; the message names the tensor.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST):
            raise CheckpointError(
                f"{path} is not a safetensors file, or was cut short: it has {size} bytes and a "
                f"header of {length}; download it again"
            )
        text = file.read(length)
    entries = parse_json(text, f"the header of {path}")
    if not isinstance(entries, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object")
    metadata = entries.pop(_METADATA, None)
    places = {n: _place(path, n, entry, 8 + length, size) for n, entry in entries.items()}
    _check_in_line(path, places, 8 + length, size)
    return Header(places, metadata)


def _check_in_line(path: Path, places: Mapping[str, TensorPlace], base: int, size: int) -> None:
    """Check that the tensors fill the file without a gap: no two share bytes, as in the library."""
    end = base
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            raise CheckpointError(
                f"{path}: tensor {name} starts at byte {place.start}, and what comes before it "
                f"ends at {end}; tensors lie one after the other: download it again"
            )
        end = place.end
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, and its tensors end at {end}; download it again"
        )


def _place(path: Path, name: str, entry: Any, base: int, size: int) -> TensorPlace:
    check_name(name, str(path))

    def numbers(key: str) -> list[int]:
        found = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(found, list) or any(type(n) is not int or n < 0 for n in found):
            raise CheckpointError(
                f"{path}: tensor {name} has {key} {shown(found)}, not a list of sizes"
            )
        return found

    offsets, shape = numbers("data_offsets"), tuple(numbers("shape"))
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {shown(repr(dtype))}; known: {list(DTYPES)}"
        )
    if len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{path}: tensor {name} has the shape {shown(shape)}, which is none")
    if len(offsets) != 2 or offsets[1] - offsets[0] != byte_size(dtype, shape):
        raise CheckpointError(
            f"{path}: tensor {name} of {dtype} {list(shape)} lies at {offsets}, but takes "
            f"{byte_size(dtype, shape)} bytes"
        )
    if base + offsets[1] > size:
        raise CheckpointError(
            f"{path} was cut short: tensor {name} ends at byte {base + offsets[1]} of {size}; "
            "download it again"
        )
    if not is_shape(shape):  # of nothing, and larger than any
        raise CheckpointError(f"{path}: tensor {name} has the shape {shown(shape)}, which is none")
    return TensorPlace(path, dtype, shape, base + offsets[0], base + offsets[1])


def read_tensor(place: TensorPlace, memory: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Read a tensor into new memory: a mapped file might be truncated while in use.

    Args:
        memory: prepares a tensor that has no values yet, or returns another in its place.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    result = torch.empty(place.shape, dtype=DTYPES[place.dtype], device="cpu")
    result = result if memory is None else memory(result)
    with open(place.path, "rb") as file:
        file.seek(place.start)
        read = file.readinto(bytes_of(result)) if place.nbytes else 0
    if read != place.nbytes:
        raise CheckpointError(f"{place.path} was cut short while it was read; download it again")
    return result
