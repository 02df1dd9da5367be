"""What each rank has written of one save, and all of it as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fqcompile.checkpoint.manifest import (
    PackedRecord,
    PartsRecord,
    ShardRecord,
    SlotRecord,
    TensorRecord,
)
from fqcompile.distributed.layout import Layout
from fqcompile.errors import CheckpointError


@dataclass(frozen=True)
class Held:
    """A rank's part of a value: its name, the whole's shape, and which part it is."""

    name: str
    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Written:
    """As in the manifest.

    Attributes:
        held: by value that is in parts, those parts.
        same: what was not written, as the first rank must have written the same.
    """

    shards: tuple[ShardRecord, ...]
    tensors: Mapping[str, TensorRecord]
    packed: Mapping[str, PackedRecord]
    slots: Mapping[str, SlotRecord]
    held: Mapping[str, tuple[Held, ...]]
    same: Mapping[str, TensorRecord]


def merged(ranks: Sequence[Written]) -> Written:
    """All of it.

    Raises:
        CheckpointError: the ranks have unlike models, or unlike values of what is no part.
    """
    first, shards = ranks[0], 0
    tensors: dict[str, TensorRecord] = {}
    for number, own in enumerate(ranks):
        if own.slots != first.slots or own.held.keys() != first.held.keys():
            raise CheckpointError(
                f"rank {number} has other parameters than rank 0: "
                f"{sorted(own.slots.keys() ^ first.slots.keys()) or 'they are spread otherwise'}"
            )
        _check_same(number, own, first)
        for name, record in own.tensors.items():
            tensors[name] = replace(record, shard=record.shard + shards)
        shards += len(own.shards)
    return Written(
        shards=tuple(shard for own in ranks for shard in own.shards),
        tensors=tensors,
        packed={name: record for own in reversed(ranks) for name, record in own.packed.items()},
        slots=first.slots,
        held={name: tuple(part for own in ranks for part in own.held[name]) for name in first.held},
        same={},
    )


def parts_record(held: Sequence[Held]) -> PartsRecord:
    """How to read a value that is in parts; some ranks may hold the same one."""
    names = {part.layout.own: part.name for part in held}
    layout = held[0].layout
    return PartsRecord(
        shape=held[0].shape,
        dim=layout.dim,
        parts=tuple(names[number] for number in range(len(layout.runs))),
        bounds=tuple(tuple(bound for run in runs for bound in run) for runs in layout.runs),
    )


def _check_same(number: int, own: Written, first: Written) -> None:
    for name, record in own.same.items():
        other = first.tensors.get(name)
        if other is None or replace(record, shard=0, start=0) != replace(other, shard=0, start=0):
            raise CheckpointError(
                f"{name} is not the same on rank {number} and on rank 0, and is no DTensor that "
                "says how they belong together: distribute it, or make it equal on all ranks"
            )
