"""The manifest `fqcompile.json`: the contents of a directory, with checksums.

    {"format": "fqcompile", "version": 4, "sha256": of the content, "content": {...}}

A slot is a name in the model (a parameter, a buffer or a plain attribute); its value is a packed
weight, a dense tensor, or the shards of either that several ranks wrote. Tied names share a value.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from fqcompile.checkpoint.packed_record import PackedRecord, described
from fqcompile.distributed.shards import Sharding
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import DTYPES, byte_size, encode_header, is_shape
from fqcompile.files.untrusted import check_name, checked, parse_json, shown
from fqcompile.report import installed_version

MANIFEST, JOURNAL = "fqcompile.json", "fqcompile.journal"
SHARD = "fqcompile-"  # how the names of shards begin
GENERATION = re.compile(r"[0-9a-f]{8}")
SHARD_FILE = re.compile(rf"{SHARD}({GENERATION.pattern})-\d{{5}}\.safetensors")
# Version 2 added sharded values, version 3 levels: without them there were none, and uniform ones.
# Version 4 added shards that describe themselves.
FORMAT, VERSION, OLDEST_VERSION = "fqcompile", 4, 1
KINDS = ("parameter", "buffer", "attribute")


@dataclass(frozen=True)
class ShardRecord:
    """A file and its size; `described`: its header has the records of its packed weights."""

    file: str
    bytes: int
    described: bool = False


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
class PartsRecord:
    """A sharded value, written by several ranks.

    Attributes:
        shape: the full shape.
        dim: the dimension along which it is sharded.
        parts: names of packed weights or dense tensors.
        bounds: per part, start and stop of each run of `dim` that it holds, flattened.
    """

    shape: tuple[int, ...]
    dim: int
    parts: tuple[str, ...]
    bounds: tuple[tuple[int, ...], ...]

    @property
    def sharding(self) -> Sharding:
        """The sharding as if this process held the first part."""
        runs = (tuple(zip(b[::2], b[1::2], strict=True)) for b in self.bounds)
        return Sharding(self.dim, tuple(runs), 0)


@dataclass(frozen=True)
class SlotRecord:
    """The destination of a value: a parameter, a buffer or an attribute of that name."""

    kind: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of the manifest.

    Attributes:
        generation: the tag in the names of this save's files.
        versions: versions of the packages that wrote it.
        model: `class` and `config` of the model; the config is None if the model has none.
        options, sites: from the plan; if several ranks wrote, from the plan of the first rank.
        files: other files that were written next to the shards.
        sharded: the sharded values.
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
    sharded: Mapping[str, PartsRecord] = field(default_factory=dict)

    def shape_of(self, value: str) -> tuple[int, ...]:
        """Shape of a value as a dense tensor."""
        if value in self.sharded:
            return self.sharded[value].shape
        return self.packed[value].shape if value in self.packed else self.tensors[value].shape

    def to_json(self) -> str:
        content = asdict(self)
        outer = {"format": FORMAT, "version": VERSION, "sha256": _digest(content)}
        return json.dumps({**outer, "content": content}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Self:
        """Parse the text that `to_json` wrote to `path`.

        Raises:
            CheckpointError: it has another format or version, or is damaged.
        """
        outer = parse_json(text, str(path), "it was cut short or changed: save the model again")
        if not isinstance(outer, dict) or outer.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a manifest of fqcompile: save the model again")
        form = outer.get("version")
        if form not in range(OLDEST_VERSION, VERSION + 1):
            raise CheckpointError(
                f"{path} has format version {shown(repr(form))}, and this fqcompile reads "
                f"{OLDEST_VERSION} to {VERSION}: install the fqcompile that wrote it, or save "
                "the model again"
            )
        content = outer.get("content")
        if outer.get("sha256") != _digest(content):
            raise CheckpointError(
                f"{path} is not what was written: its checksum differs; copy it again or save the "
                "model again"
            )
        manifest = checked(cls, content, f"{path}: content")
        for name in _names(manifest):
            check_name(name, f"{path}: content")
        for problem in _problems(manifest):
            raise CheckpointError(f"{path}: {shown(problem)}; save the model again")
        return manifest

    def index(self) -> bytes:
        """The files of the tensors, as an index of Hugging Face."""
        files = {name: self.shards[tensor.shard].file for name, tensor in self.tensors.items()}
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        content = {"metadata": {"total_size": size}, "weight_map": files}
        return json.dumps(content, indent=2, sort_keys=True).encode()

    def shard_header(self, index: int) -> bytes:
        """The header with which the shard's file must begin."""
        inside = [(t.start, name, t) for name, t in self.tensors.items() if t.shard == index]
        inside.sort(key=lambda item: item[:2])
        entries = {name: (t.dtype, t.shape, t.start) for _, name, t in inside}
        if not self.shards[index].described:
            return encode_header(entries)
        records = {name: r for name, r in self.packed.items() if r.codes in entries}
        return encode_header(entries, described(records))


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the writing packages: fqcompile, torch and, if installed, transformers."""
    names = [name for name in ("fqcompile", "torch", "transformers") if find_spec(name)]
    return {name: installed_version(name) for name in names}


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a directory.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: it is no directory that fqcompile.save or `fqcompile "
            "quantize` finished"
        )
    return Manifest.from_json(path.read_bytes(), path)


def _names(manifest: Manifest) -> Iterator[object]:
    """All names in a manifest that error messages may show."""
    yield from (name for name in (manifest.model.get("class"),) if name is not None)
    yield from (shard.file for shard in manifest.shards)
    for named in (manifest.tensors, manifest.packed, manifest.slots, manifest.sharded):
        yield from named


def _problems(manifest: Manifest) -> Iterator[str]:
    """Problems: records that contradict each other, or refer to missing records."""
    if not GENERATION.fullmatch(manifest.generation):
        yield f"the generation is {manifest.generation!r}, not 8 hexadecimal digits"
    for shard in manifest.shards:
        if not SHARD_FILE.fullmatch(shard.file):
            yield f"{shard.file!r} is not a shard of the directory"
    for name, tensor in manifest.tensors.items():
        if not is_shape(tensor.shape):
            yield f"tensor {name} has the shape {shown(tensor.shape)}"
        if tensor.shard >= len(manifest.shards) or tensor.dtype not in DTYPES:
            yield f"tensor {name} of {tensor.dtype!r} in shard {tensor.shard}, which is not there"
    for name, record in manifest.packed.items():
        problem = record.problem(manifest.tensors)
        if problem is not None:
            yield f"packed weight {name}: {problem}"
    values = {**manifest.packed, **manifest.tensors, **manifest.sharded}
    for name, slot in manifest.slots.items():
        if slot.kind not in KINDS:
            yield f"{name} is a {slot.kind!r}, not one of {KINDS}"
        if slot.value not in values:
            yield f"the value {slot.value!r} of {name} is not there"
    for name, parts in manifest.sharded.items():
        problem = _parts_problem(manifest, parts)
        if problem is not None:
            yield f"{name}, in parts: {problem}"


def _parts_problem(manifest: Manifest, record: PartsRecord) -> str | None:
    """Why the parts do not form the whole value, or None."""
    if record.dim >= len(record.shape) or len(record.parts) != len(record.bounds):
        return f"{len(record.bounds)} of {len(record.parts)} parts along dimension {record.dim}"
    if any(len(bounds) % 2 for bounds in record.bounds):
        return "a run of it has no end"
    runs = sorted(run for runs in record.sharding.runs for run in runs)
    ends = [0, *(stop for _, stop in runs)]
    starts = [*(start for start, _ in runs), record.shape[record.dim]]
    if starts != ends:
        return f"its runs {runs} do not cover {record.shape[record.dim]}"
    for part, held in zip(record.parts, record.sharding.runs, strict=True):
        if part not in manifest.packed and part not in manifest.tensors:
            return f"{part} is not there"
        shape = list(record.shape)
        shape[record.dim] = sum(stop - start for start, stop in held)
        if manifest.shape_of(part) != tuple(shape):
            return f"{part} is {list(manifest.shape_of(part))}, expected {shape}"
    return None
