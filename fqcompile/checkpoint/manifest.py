"""The manifest `fqcompile.json`: what a directory holds, and the checksums that prove it.

    {"format": "fqcompile", "version": 1, "sha256": of the content, "content": {...}}

A slot is a name in the model (a parameter, a buffer or a plain attribute); its value is a packed
weight, or the dense tensor of that name. Tied names have one value.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fqcompile.checkpoint.checked_fields import checked
from fqcompile.checkpoint.safetensors_file import DTYPES, byte_size, encode_header
from fqcompile.errors import CheckpointError
from fqcompile.quant.granularity import num_groups
from fqcompile.quant.packing import packed_columns
from fqcompile.quant.qtype import QTYPES
from fqcompile.quant.validate import WEIGHT_DTYPES

MANIFEST = "fqcompile.json"
FORMAT, VERSION = "fqcompile", 1
KINDS = ("parameter", "buffer", "attribute")


@dataclass(frozen=True)
class ShardRecord:
    """A file and its size."""

    file: str
    bytes: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in a shard; `start` counts from the end of the shard's header."""

    shard: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    sha256: str

    @property
    def nbytes(self) -> int:
        return byte_size(self.dtype, self.shape)


@dataclass(frozen=True)
class PackedRecord:
    """A packed weight: the tensors of its codes and scales, and how to read them.

    `rows` and `k` are those of one of the `experts` (0: there is no stack); `dtype` is that of the
    weight it stands for.
    """

    codes: str
    scale: str
    dtype: str
    bits: int
    group_size: int
    rows: int
    k: int
    experts: int
    transposed: bool
    scale_method: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        matrix = (self.k, self.rows) if self.transposed else (self.rows, self.k)
        return (self.experts, *matrix) if self.experts else matrix

    @property
    def all_rows(self) -> int:
        return self.rows * max(1, self.experts)


@dataclass(frozen=True)
class SlotRecord:
    """Where a value goes: a parameter, a buffer or an attribute of that name."""

    kind: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content.

    Attributes:
        generation: the tag in the names of this save's files.
        versions: of the packages that wrote it.
        model: `class` and `config` of the model; the config is None where it has none.
        options, sites: those of the plan.
        files: others that were written beside the shards.
    """

    generation: str
    versions: Mapping[str, str]
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    sites: tuple[Mapping[str, Any], ...]
    shards: tuple[ShardRecord, ...]
    tensors: Mapping[str, TensorRecord]
    packed: Mapping[str, PackedRecord]
    slots: Mapping[str, SlotRecord]
    files: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        content = asdict(self)
        return json.dumps(
            {"format": FORMAT, "version": VERSION, "sha256": _digest(content), "content": content},
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Self:
        """What `to_json` wrote to `path`.

        Raises:
            CheckpointError: it has another format or version, or is not what was written.
        """
        try:
            outer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not JSON ({error}): it was cut short or changed"
            ) from (error)
        if not isinstance(outer, dict) or outer.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no manifest of fqcompile: save the model again")
        if outer.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has format version {outer.get('version')!r}, and this fqcompile reads "
                f"version {VERSION}: install the fqcompile that wrote it, or save the model again"
            )
        content = outer.get("content")
        if outer.get("sha256") != _digest(content):
            raise CheckpointError(
                f"{path} is not what was written: its checksum differs; copy it again or save the "
                "model again"
            )
        manifest = checked(cls, content, f"{path}: content")
        for problem in _problems(manifest):
            raise CheckpointError(f"{path}: {problem}; save the model again")
        return manifest

    def shard_header(self, index: int) -> bytes:
        """The header that the shard's file must begin with."""
        inside = [(t.start, name, t) for name, t in self.tensors.items() if t.shard == index]
        inside.sort(key=lambda item: item[:2])
        return encode_header({name: (t.dtype, t.shape, t.start) for _, name, t in inside})


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """That of a directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: it is no directory that fqcompile.save or `fqcompile "
            "quantize` finished"
        )
    return Manifest.from_json(path.read_bytes(), path)


def _problems(manifest: Manifest) -> Iterator[str]:
    """Where one record contradicts another, or names nothing."""
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file:
            yield f"shard {shard.file!r} is no file of the directory"
    for name, tensor in manifest.tensors.items():
        if tensor.shard >= len(manifest.shards) or tensor.dtype not in DTYPES:
            yield f"tensor {name} of {tensor.dtype!r} in shard {tensor.shard}, which is not there"
    for name, record in manifest.packed.items():
        tensors = manifest.tensors.get(record.codes), manifest.tensors.get(record.scale)
        problem = _packed_problem(record, *tensors)
        if problem is not None:
            yield f"packed weight {name}: {problem}"
    for name, slot in manifest.slots.items():
        if slot.kind not in KINDS:
            yield f"{name} is a {slot.kind!r}, not one of {KINDS}"
        if slot.value not in manifest.packed and slot.value not in manifest.tensors:
            yield f"the value {slot.value!r} of {name} is not there"


def _packed_problem(
    record: PackedRecord, codes: TensorRecord | None, scale: TensorRecord | None
) -> str | None:
    """Why the tensors cannot be what the record says, or None."""
    if record.bits not in QTYPES or not 1 <= record.group_size <= max(1, record.k):
        return f"{record.bits} bits in groups of {record.group_size} of {record.k}"
    if DTYPES.get(record.dtype) not in WEIGHT_DTYPES:
        return f"dtype {record.dtype!r}"
    if codes is None or scale is None:
        return "its codes or scales are not there"
    qtype = QTYPES[record.bits]
    expected = (record.all_rows, packed_columns(qtype, record.k))
    if codes.shape != expected or DTYPES[codes.dtype] != qtype.storage_dtype:
        return f"codes {codes.dtype} {list(codes.shape)}, expected {list(expected)}"
    expected = (record.all_rows, num_groups(record.k, record.group_size))
    if scale.shape != expected or DTYPES[scale.dtype] not in WEIGHT_DTYPES:
        return f"scales {scale.dtype} {list(scale.shape)}, expected {list(expected)}"
    return None
