"""save: a quantised model to a directory that any machine reads back without quantising again."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fqcompile.checkpoint.directory import commit, new_generation, readable_manifest, stage, writing
from fqcompile.checkpoint.hugging_face import config_of, hugging_face_files
from fqcompile.checkpoint.manifest import Manifest, PackedRecord, SlotRecord
from fqcompile.checkpoint.packed_record import write_packed
from fqcompile.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES
from fqcompile.checkpoint.shards import ShardWriter
from fqcompile.checkpoint.slots import Slot, slots
from fqcompile.checkpoint.versions import versions
from fqcompile.errors import CheckpointError
from fqcompile.report import Plan, Site
from fqcompile.weights.freed import is_freed
from fqcompile.weights.packed_weight import PackedWeight
from fqcompile.weights.release import packed_form

# What answers with the packed form of a tensor that has one; the first that does is taken.
PACKED_FORMS: list[Callable[[Tensor], PackedWeight | None]] = [
    lambda tensor: tensor if isinstance(tensor, PackedWeight) else None,
    packed_form,
]


def save(model: nn.Module, directory: str | os.PathLike[str], *, plan: Plan | None = None) -> Path:
    """Write a model that `fqcompile.quantize_` has quantised, or `free_weights` left only packed.

    Packed weights are written as codes and scales in the plain layout, all other tensors as they
    are; tied ones once. A model of Hugging Face gets its `config.json` and `generation_config.json`
    beside them. What was in the directory is replaced as a whole: killed at any moment, this leaves
    the old save or the new one. Files that are not of a save, such as a tokenizer's, stay.

    Args:
        plan: of `quantize_`, for the record of options and errors; without it, bits and group sizes
            are recorded alone.

    Raises:
        CheckpointError: no weight is packed; a tensor cannot be written (it is on the meta device,
            was freed, or is of a kind that only the process which made it knows); a module has
            extra state; another process writes to the directory.
    """
    found = list(slots(model))
    _check_savable(model, found)
    target, generation = Path(directory), new_generation()
    with writing(target):
        writer = ShardWriter(target, generation)
        records, packed = _write_slots(found, writer)
        inner = getattr(model, "_orig_mod", model)
        files = hugging_face_files(inner)
        before = readable_manifest(target)
        stage(target, generation, files)
        names = dict.fromkeys([*files, *(before.files if before else ())])
        sites = plan.sites if plan else [_site(n, r, writer) for n, r in packed.items()]
        manifest = Manifest(
            generation=generation,
            versions=versions(),
            model={"class": type(inner).__name__, "config": config_of(files)},
            options=dict(plan.options) if plan else {},
            sites=tuple(site.as_dict() for site in sites),
            shards=tuple(writer.shards),
            tensors=writer.tensors,
            packed=packed,
            slots=records,
            files=tuple(names),
        )
        commit(target, manifest)
    return target


def _packed_form(tensor: Tensor) -> PackedWeight | None:
    return next((form for ask in PACKED_FORMS if (form := ask(tensor)) is not None), None)


def _write_slots(
    found: Iterable[Slot], writer: ShardWriter
) -> tuple[dict[str, SlotRecord], dict[str, PackedRecord]]:
    records: dict[str, SlotRecord] = {}
    packed: dict[str, PackedRecord] = {}
    values: dict[int, str] = {}
    for slot in found:
        value = values.setdefault(id(slot.tensor), slot.name)
        records[slot.name] = SlotRecord(slot.kind, value)
        if value != slot.name:
            continue
        weight = _packed_form(slot.tensor)
        if weight is None:
            writer.add({slot.name: slot.tensor})
        else:
            packed[slot.name] = _write_packed(writer, slot.name, weight)
        if writer.is_full:
            writer.flush()
    writer.flush()
    return records, packed


def _write_packed(writer: ShardWriter, name: str, weight: PackedWeight) -> PackedRecord:
    form = weight.form
    return write_packed(
        writer,
        name,
        weight.quantized(),
        dtype=weight.dtype,
        experts=form.experts,
        transposed=form.transposed,
        scale_method=form.scale_method,
    )


def _check_savable(model: nn.Module, found: list[Slot]) -> None:
    """Before anything is written."""
    if not any(_packed_form(slot.tensor) is not None for slot in found):
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
    for slot in found:
        reason = None if _packed_form(slot.tensor) is not None else _unsavable(slot.tensor)
        if reason is not None:
            raise CheckpointError(f"{slot.name} cannot be saved: {reason}")


def _unsavable(tensor: Tensor) -> str | None:
    if is_freed(tensor):
        return "it was freed, and is packed in slices; call fqcompile.restore(model) first"
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"it is a {type(tensor).__name__}; replace it by a plain tensor"
    if tensor.is_meta:
        return "it is on the meta device and has no values; load the model first"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"it is {tensor.layout} or quantised by PyTorch; make it dense"
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return "its memory was freed; call fqcompile.restore(model) first"
    if tensor.dtype not in DTYPE_NAMES:
        return f"safetensors files have no {tensor.dtype}; cast it"
    return None


def _site(name: str, record: PackedRecord, writer: ShardWriter) -> Site:
    """What the packed weight alone tells of its site."""
    matrix = (record.rows, record.k)
    tensors = (writer.tensors[tensor] for tensor in (record.codes, record.scale))
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
