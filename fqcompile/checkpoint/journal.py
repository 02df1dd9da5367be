"""The journal of a run over a checkpoint, which lists complete shards, so that it can resume.

    {"identity": ..., "generation": ...}        of what, how
    {"shards": [...], "tensors": {...}, ...}    one line per finished shard

A line is appended when its shard is on disk. The shard of an incomplete last line is written again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fqcompile.checkpoint.directory import staged
from fqcompile.checkpoint.manifest import (
    GENERATION,
    JOURNAL,
    SHARD_FILE,
    ShardRecord,
    SlotRecord,
    TensorRecord,
)
from fqcompile.checkpoint.packed_record import PackedRecord
from fqcompile.errors import CheckpointError
from fqcompile.files.trusted import append_to_file, remove, replace_durably, sync_directory
from fqcompile.files.untrusted import checked, parse_json, shown

T = TypeVar("T")
_REMEDY = "give overwrite=True (--overwrite) to start anew"


@dataclass(frozen=True)
class _Head:
    identity: str
    generation: str


@dataclass
class Progress:
    """The contents of one shard, or of all so far; `sites` are rows of the plan by name."""

    shards: tuple[ShardRecord, ...] = ()
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    packed: Mapping[str, PackedRecord] = field(default_factory=dict)
    slots: Mapping[str, SlotRecord] = field(default_factory=dict)
    sites: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, later: "Progress") -> "Progress":
        return Progress(
            (*self.shards, *later.shards),
            {**self.tensors, **later.tensors},
            {**self.packed, **later.packed},
            {**self.slots, **later.slots},
            {**self.sites, **later.sites},
        )


class Journal:
    """The journal of a directory; at most one."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / JOURNAL

    def start(self, identity: str, generation: str, progress: Progress) -> None:
        """Start the journal, replacing any other, or one with an incomplete last line."""
        waiting = staged(self.path.parent, JOURNAL, generation)
        replace_durably(self.path, [_line(_Head(identity, generation)), _line(progress)], waiting)

    def note(self, progress: Progress) -> None:
        """Record another shard, which must be on disk with its directory entry."""
        sync_directory(self.path.parent)
        append_to_file(self.path, _line(progress))

    def close(self) -> None:
        remove(self.path)

    def read(self, identity: str) -> tuple[str, Progress] | None:
        """Generation and progress of an unfinished run; None if there is none.

        Raises:
            CheckpointError: it was a run with another checkpoint, options or versions.
        """
        if not self.path.is_file():
            return None
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what has no end was not written whole
        if not lines:
            return None
        head = _parsed(_Head, lines[0], f"{self.path}: line 1")
        if not GENERATION.fullmatch(head.generation):
            raise CheckpointError(
                f"{self.path} has the generation {shown(repr(head.generation))}, not 8 hexadecimal "
                f"digits; {_REMEDY}"
            )
        if head.identity != identity:
            raise CheckpointError(
                f"{self.path} is of another run: another checkpoint, or other options or versions; "
                "repeat those to resume it, or give overwrite=True (--overwrite) to start anew"
            )
        progress = Progress()
        for number, line in enumerate(lines[1:], 2):
            progress += _parsed(Progress, line, f"{self.path}: line {number}")
        self._check_shards(progress)
        return head.generation, progress

    def _check_shards(self, progress: Progress) -> None:
        for shard in progress.shards:
            path = self.path.parent / shard.file
            known = SHARD_FILE.fullmatch(shard.file) and path.is_file()
            if not known or path.stat().st_size != shard.bytes:
                raise CheckpointError(f"{shown(path)} is not as {self.path.name} says; {_REMEDY}")


def _line(record: Any) -> bytes:
    return json.dumps(asdict(record), separators=(",", ":")).encode() + b"\n"


def _parsed(kind: type[T], line: bytes, where: str) -> T:
    found = parse_json(line, where, _REMEDY)
    return checked(kind, found, where)
