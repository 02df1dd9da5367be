"""save: a quantised model to a directory that any machine reads back without quantising again."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from fqcompile.checkpoint.directory import (
    check_not_replaced,
    commit,
    new_generation,
    readable_manifest,
    stage,
    writing,
)
from fqcompile.checkpoint.durable_files import writing_to
from fqcompile.checkpoint.hugging_face import config_of, hugging_face_files
from fqcompile.checkpoint.json_text import check_name
from fqcompile.checkpoint.manifest import Manifest, PackedRecord, SlotRecord
from fqcompile.checkpoint.packed_record import write_packed
from fqcompile.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES
from fqcompile.checkpoint.shards import DigestWriter, ShardWriter
from fqcompile.checkpoint.slots import Slot, slots
from fqcompile.checkpoint.versions import versions
from fqcompile.checkpoint.written import Held, Written, merged, parts_record
from fqcompile.distributed.layout import layout_of
from fqcompile.distributed.ranks import Team
from fqcompile.distributed.shards import local_part, team_of
from fqcompile.errors import CheckpointError, OptionError
from fqcompile.report import CompileReport, Plan, Site
from fqcompile.weights.parameter import PackedWeight


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    plan: Plan | CompileReport | None = None,
) -> Path:
    """Write a model that `fqcompile.quantize_` has quantized.

    Packed weights are written as codes and scales in the plain layout, all other tensors as they
    are; tied ones once. A model of Hugging Face gets its `config.json` and `generation_config.json`
    beside them. What was in the directory is replaced as a whole: killed at any moment, this leaves
    the old save or the new one. Files that are not of a save, such as a tokenizer's, stay.

    A model that is spread over ranks is saved by all of them at once, each its parts, to one
    directory that all see; it loads on any other number of ranks that its groups allow.

    Args:
        plan: of `quantize_`, or the report of a compilation, for the record of options and errors;
            without it, bits and group sizes are recorded alone.

    Raises:
        CheckpointError: no weight is packed; a tensor cannot be written (it is on the meta device,
            has no memory, or is of a kind that only the process which made it knows); a module has
            extra state; another process writes to the directory, or it cannot be written; a config
            of something else lies there; what every rank should hold is not the same on all.
        OptionError: `plan` is something else. RankError: another rank failed, or has ended.
        ShardingError: the model is spread in a way that is not known here.
    """
    recorded, found = _recorded(plan), list(slots(model))
    team = team_of(slot.tensor for slot in found)
    target = Path(directory)
    with ExitStack() as owned:

        def begin() -> str:
            _check_savable(model, found)
            if not team.index:
                check_not_replaced(target, _files(model), "give another directory, or move it away")
                owned.enter_context(writing(target))
            return new_generation()

        def end() -> None:
            if not team.index:
                _finish(target, generation, model, recorded, merged(written))

        # What one rank does in the directory comes after all others have done what is before it.
        told = writing_to(target)  # to all, with the remedy, what the system refuses to one
        generation = team.together(told(begin))[0]
        written = team.together(told(lambda: _write_slots(found, target, generation, team)))
        team.together(told(end))
    return target


def _recorded(plan: object) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    if isinstance(plan, CompileReport):
        return plan.plan
    raise OptionError(
        f"plan is a {type(plan).__name__}; allowed: what fqcompile.quantize_ returned, one report, "
        "such as fqcompile.reports()[-1], or None"
    )


def _finish(
    target: Path, generation: str, model: nn.Module, plan: Plan | None, written: Written
) -> None:
    """Other files and the manifest, when all shards are there."""
    inner, files = getattr(model, "_orig_mod", model), _files(model)
    before = readable_manifest(target)
    stage(target, generation, files)
    names = dict.fromkeys([*files, *(before.files if before else ())])
    sites = plan.sites if plan else [_site(n, r, written) for n, r in written.packed.items()]
    manifest = Manifest(
        generation=generation,
        versions=versions(),
        model={"class": type(inner).__name__, "config": config_of(files)},
        options=dict(plan.options) if plan else {},
        sites=tuple(site.as_dict() for site in sites),
        shards=written.shards,
        tensors=written.tensors,
        packed=written.packed,
        slots=written.slots,
        files=tuple(names),
        sharded={name: parts_record(held) for name, held in written.held.items()},
    )
    commit(target, manifest)


def _files(model: nn.Module) -> dict[str, bytes]:
    return hugging_face_files(getattr(model, "_orig_mod", model))


def _write_slots(found: Iterable[Slot], directory: Path, generation: str, team: Team) -> Written:
    """What this rank writes: its parts and, on the first, all that is the same on every rank."""
    writer = ShardWriter(directory, generation, first=team.index, step=team.size)
    shared = DigestWriter(directory, generation) if team.index else writer
    records: dict[str, SlotRecord] = {}
    packed: dict[str, PackedRecord] = {}
    held: dict[str, Held] = {}
    values: dict[int, str] = {}
    for slot in found:
        value = values.setdefault(id(slot.tensor), slot.name)
        records[slot.name] = SlotRecord(slot.kind, value)
        if value != slot.name:
            continue
        layout, name, target = layout_of(slot.tensor), value, shared
        if layout is not None:
            name, target = f"{value}.part{layout.own}", writer
            held[value] = Held(name, tuple(slot.tensor.shape), layout)
            if not layout.leads:
                continue
        weight = local_part(slot.tensor)
        if isinstance(weight, PackedWeight):
            packed[name] = write_packed(target, name, weight.quantized(), weight.dtype)
        else:
            target.add({name: weight})
        if target.is_full:
            target.flush()
    writer.flush()
    shared.flush()
    return Written(
        shards=tuple(writer.shards),
        tensors=writer.tensors,
        packed=packed,
        slots=records,
        held={name: (own,) for name, own in held.items()},
        same={} if shared is writer else shared.tensors,
    )


def _check_savable(model: nn.Module, found: list[Slot]) -> None:
    """Before anything is written."""
    parts = {slot.name: local_part(slot.tensor) for slot in found}
    if not any(isinstance(part, PackedWeight) for part in parts.values()):
        raise CheckpointError(
            "the model has no packed weight: call fqcompile.quantize_(model) first, or save it "
            "with torch.save or save_pretrained"
        )
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"module {name or 'itself'} ({type(module).__name__}) has extra state, which no "
                "tensor holds; keep it as a buffer to save it"
            )
    for name, part in parts.items():
        check_name(name, "the model")
        reason = None if isinstance(part, PackedWeight) else _unsavable(part)
        if reason is not None:
            raise CheckpointError(f"{name} cannot be saved: {reason}")


def _unsavable(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"it is a {type(tensor).__name__}; replace it by a plain tensor"
    if tensor.is_meta:
        return "it is on the meta device and has no values; load the model first"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"it is {tensor.layout} or quantised by PyTorch; make it dense"
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return "its memory was freed by resizing its storage; give it values first"
    if tensor.dtype not in DTYPE_NAMES:
        return f"safetensors files have no {tensor.dtype}; cast it"
    return None


def _site(name: str, record: PackedRecord, written: Written) -> Site:
    """What the packed weight alone tells of its site."""
    matrix = (record.rows, record.k)
    tensors = (written.tensors[tensor] for tensor in (record.codes, record.scale))
    return Site(
        name=name,
        kind="experts" if record.experts else "linear",
        shape=(record.experts, *matrix) if record.experts else matrix,
        status="quantized",
        bits=record.bits,
        group_size=record.group_size,
        bytes_before=record.all_rows * record.k * DTYPES[record.dtype].itemsize,
        bytes_after=sum(tensor.nbytes for tensor in tensors),
    )
