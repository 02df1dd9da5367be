"""save: write a quantized model to a directory that any machine loads without requantizing."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fqcompile.checkpoint.directory import (
    check_not_replaced,
    commit,
    new_generation,
    readable_manifest,
    stage,
    writing,
    writing_to,
)
from fqcompile.checkpoint.hugging_face import config_of, hugging_face_files
from fqcompile.checkpoint.manifest import (
    Manifest,
    PartsRecord,
    ShardRecord,
    SlotRecord,
    TensorRecord,
    versions,
)
from fqcompile.checkpoint.model import Slot, named_alone, slots
from fqcompile.checkpoint.packed_record import PackedRecord
from fqcompile.checkpoint.shards import DigestWriter, ShardWriter
from fqcompile.checkpoint.source import INDEX
from fqcompile.distributed.ranks import Team
from fqcompile.distributed.shards import Sharding, local_part, sharding_of, team_of
from fqcompile.errors import CheckpointError, OptionError
from fqcompile.files.safetensors_file import DTYPES
from fqcompile.modules.given import check_model, check_savable
from fqcompile.report import CompileReport, Plan, Site
from fqcompile.weights.parameter import PackedWeight

_ELSEWHERE = "give another directory, or move it away"


@dataclass(frozen=True)
class _Held:
    """One rank's shard of a tensor: its name, the full shape, and the part it covers."""

    name: str
    shape: tuple[int, ...]
    sharding: Sharding


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Records for the manifest; `held`: shards by the name of the sharded tensor.

    `same`: tensors that only the first rank writes, which must be equal on all ranks.
    """

    shards: tuple[ShardRecord, ...]
    tensors: Mapping[str, TensorRecord]
    packed: Mapping[str, PackedRecord]
    slots: Mapping[str, SlotRecord]
    held: Mapping[str, tuple[_Held, ...]]
    same: Mapping[str, TensorRecord]


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    plan: Plan | CompileReport | None = None,
) -> Path:
    """Write a model that `fqcompile.quantize_` has quantized.

    Packed weights are written as codes and scales in the plain layout, all other tensors unchanged;
    tied tensors once. For a Hugging Face model, its configs and an index are written too, so that
    `from_pretrained` opens it (`fqcompile.integrations.transformers`). An earlier save is replaced
    atomically: a killed process leaves the old one or the new one. A tokenizer's files, say, stay.

    A sharded model is saved by all ranks together, each rank its own shards, to a directory that
    all can reach. It can be loaded on any number of ranks that its group sizes allow.

    Args:
        plan: the plan of `quantize_` or the report of a compilation, to record options and errors;
            without it only bits and group sizes are recorded.

    Raises:
        CheckpointError: no weight is packed; a tensor has no values here, or no portable type; a
            module has extra state; the directory cannot be written, another process writes to it,
            or it holds the config of another model; a tensor without shards differs between ranks.
        OptionError: `plan` or `model` is another type. RankError: another rank failed or exited.
        ShardingError: the model is sharded in an unsupported way.
    """
    check_model(model, "save")
    recorded, found, target = _recorded(plan), list(slots(model)), Path(directory)
    inner: nn.Module = getattr(model, "_orig_mod", model)
    team = team_of(slot.tensor for slot in found)
    with ExitStack() as owned:

        def begin() -> str:
            check_savable(model, {slot.name: local_part(slot.tensor) for slot in found})
            if not team.index:
                check_not_replaced(target, _files(inner, recorded), _ELSEWHERE)
                owned.enter_context(writing(target))
            return new_generation()

        def end() -> None:
            if not team.index:
                _finish(target, generation, inner, recorded, _merged(written))

        # Each step in the directory starts when all ranks have finished the step before it.
        told = writing_to(target)  # an OSError of one rank is raised on all, with the remedy
        generation = team.together(told(begin))[0]
        written = team.together(told(lambda: _write_slots(inner, found, target, generation, team)))
        team.together(told(end))
    return target


def _recorded(plan: object) -> Plan | None:
    if plan is None or isinstance(plan, Plan | CompileReport):
        return plan.plan if isinstance(plan, CompileReport) else plan
    raise OptionError(
        f"plan is a {type(plan).__name__}; allowed: what fqcompile.quantize_ returned, one report, "
        "such as fqcompile.reports()[-1], or None"
    )


def _finish(
    target: Path, generation: str, model: nn.Module, plan: Plan | None, written: _Written
) -> None:
    """Write the other files and the manifest, after all shards."""
    files = _files(model, plan)
    if written.held:
        files.pop(INDEX, None)  # from_pretrained reads whole tensors
    before = readable_manifest(target)
    names = dict.fromkeys([*files, *(before.files if before else ())])
    sites = plan.sites if plan else [_site(n, r, written) for n, r in written.packed.items()]
    manifest = Manifest(
        generation=generation,
        versions=versions(),
        model={"class": type(model).__name__, "config": config_of(files)},
        options=dict(plan.options) if plan else {},
        sites=tuple(site.as_dict() for site in sites),
        shards=written.shards,
        tensors=written.tensors,
        packed=written.packed,
        slots=written.slots,
        files=tuple(names),
        sharded={name: _parts_record(held) for name, held in written.held.items()},
    )
    if INDEX in files:
        files[INDEX] = manifest.index()
    stage(target, generation, files)
    commit(target, manifest)


def _files(model: nn.Module, plan: Plan | None) -> dict[str, bytes]:
    """The files of Hugging Face, of which the index is empty until the shards are known."""
    files = hugging_face_files(model, plan.options if plan else {})
    return {**files, INDEX: b""} if files else {}


def _write_slots(model: nn.Module, found: list[Slot], to: Path, tag: str, team: Team) -> _Written:
    """The tensors this rank writes: its shards and, on the first rank, all unsharded tensors."""
    again = named_alone(model, found)
    writer = ShardWriter(to, tag, first=team.index, step=team.size)
    shared = DigestWriter(to, tag) if team.index else writer
    records: dict[str, SlotRecord] = {}
    packed: dict[str, PackedRecord] = {}
    held: dict[str, _Held] = {}
    values: dict[int, str] = {}
    for slot in found:
        value = values.setdefault(id(slot.tensor), slot.name)
        records[slot.name] = SlotRecord(slot.kind, value)
        sharding, name, target = sharding_of(slot.tensor), slot.name, shared
        if value != name and (name not in again or sharding is not None):
            continue
        if sharding is not None:
            name, target = f"{value}.part{sharding.own}", writer
            held[value] = _Held(name, tuple(slot.tensor.shape), sharding)
            if not sharding.leads:
                continue
        weight = local_part(slot.tensor)
        if isinstance(weight, PackedWeight):
            packed[name] = target.add_packed(name, weight.quantized(), weight.dtype)
        else:
            target.add({name: weight})
        if target.is_full:
            target.flush()
    writer.flush()
    shared.flush()
    return _Written(
        shards=tuple(writer.shards),
        tensors=writer.tensors,
        packed=packed,
        slots=records,
        held={name: (own,) for name, own in held.items()},
        same={} if shared is writer else shared.tensors,
    )


def _site(name: str, record: PackedRecord, written: _Written) -> Site:
    """The site of a packed weight, as far as the weight itself tells."""
    matrix = (record.rows, record.k)
    tensors = (written.tensors[tensor] for tensor in (record.codes, record.scale))
    return Site(
        name=name,
        kind="experts" if record.experts else "linear",
        shape=(record.experts, *matrix) if record.experts else matrix,
        status="quantized",
        bits=record.bits,
        levels=record.levels,
        group_size=record.group_size,
        bytes_before=record.all_rows * record.k * DTYPES[record.dtype].itemsize,
        bytes_after=sum(tensor.nbytes for tensor in tensors),
    )


def _merged(ranks: Sequence[_Written]) -> _Written:
    """Merge the records of all ranks; CheckpointError if their models differ."""
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
    return _Written(
        shards=tuple(shard for own in ranks for shard in own.shards),
        tensors=tensors,
        packed={name: record for own in reversed(ranks) for name, record in own.packed.items()},
        slots=first.slots,
        held={name: tuple(part for own in ranks for part in own.held[name]) for name in first.held},
        same={},
    )


def _parts_record(held: Sequence[_Held]) -> PartsRecord:
    """The record of a sharded tensor; several ranks may hold the same shard."""
    names = {part.sharding.own: part.name for part in held}
    sharding = held[0].sharding
    return PartsRecord(
        shape=held[0].shape,
        dim=sharding.dim,
        parts=tuple(names[number] for number in range(len(sharding.runs))),
        bounds=tuple(tuple(bound for run in runs for bound in run) for runs in sharding.runs),
    )


def _check_same(number: int, own: _Written, first: _Written) -> None:
    for name, record in own.same.items():
        other = first.tensors.get(name)
        if other is None or replace(record, shard=0, start=0) != replace(other, shard=0, start=0):
            raise CheckpointError(
                f"{name} is not the same on rank {number} and on rank 0, and is no DTensor that "
                "says how they belong together: distribute it, or make it equal on all ranks"
            )
