"""load_saved: load a saved model, packed for this machine's kernels, without requantizing."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fqcompile.checkpoint.blocks import Block, assemble
from fqcompile.checkpoint.directory import check_not_written_over, file_of
from fqcompile.checkpoint.hugging_face import build_model, generation_config
from fqcompile.checkpoint.manifest import Manifest, PartsRecord, read_manifest
from fqcompile.checkpoint.model import Slot, check_fits, put, slots
from fqcompile.checkpoint.packed_record import PackedRecord
from fqcompile.checkpoint.shards import MappedShards
from fqcompile.distributed.shards import (
    Sharding,
    is_dtensor,
    local_part,
    sharding_of,
    team_of,
    with_part,
)
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import ALIGNMENT, DTYPES
from fqcompile.weights.parameter import PackedWeight

# A value, and the part of it that is held here.
Wanted = tuple[str, Sharding | None]

# One compares checksums while the other packs.
_READERS = 2


def load_saved(
    model_or_factory: nn.Module | Callable[[], nn.Module] | None,
    directory: Path,
    *,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> nn.Module:
    """A model with the weights that `save` or `fqcompile quantize` wrote; arguments as for `load`.

    Raises:
        CheckpointError: the directory is incomplete, damaged, of another format version or of
            another model; the message names files and tensors. A model that was passed in is
            unchanged.
    """
    manifest, shards = _open(directory, verify)
    model = _model(model_or_factory, manifest, directory)
    places = {slot.name: slot for slot in slots(model)}
    values: dict[str, Tensor] = {}

    def read() -> None:
        check_fits(manifest, places, model, directory)
        values.update(_values(_Reader(manifest, shards, device), places))

    # All values are read and checked before the first is assigned: if loading fails, the model is
    # unchanged.
    team_of(slot.tensor for slot in places.values()).together(read)
    for name, value in values.items():
        put(model, places.get(name), name, value)
    return model


def _values(reader: "_Reader", places: Mapping[str, Slot]) -> dict[str, Tensor]:
    """The values by slot; slots that hold the same shard share one value."""
    slots_of = reader.manifest.slots
    wanted = {name: (r.value, _sharding(places.get(name))) for name, r in slots_of.items()}
    holders: dict[Wanted, list[Slot]] = {want: [] for want in wanted.values()}
    for name, slot in places.items():
        if name in wanted:
            holders[wanted[name]].append(slot)
    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip(holders, pool.map(reader.value, holders, holders.values()), strict=True))
    return {name: found[want] for name, want in wanted.items()}


def _sharding(slot: Slot | None) -> Sharding | None:
    return None if slot is None else sharding_of(slot.tensor)


def _open(directory: Path, verify: bool) -> tuple[Manifest, MappedShards]:
    """Open the files, again if a writer replaced them after the manifest was read."""
    manifest = read_manifest(directory)
    while True:
        try:
            check_not_written_over(directory, manifest)
            return manifest, MappedShards(directory, manifest, verify=verify)
        except CheckpointError:
            newer = read_manifest(directory)
            if newer.generation == manifest.generation:
                raise
            manifest = newer


def _model(
    given: nn.Module | Callable[[], nn.Module] | None, manifest: Manifest, directory: Path
) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if given is not None and not callable(given):
        raise CheckpointError(
            f"load got a {type(given).__name__} in place of a model or a function that makes one; "
            "give that first, and the directory second"
        )
    with torch.device("meta"):
        if given is not None:
            return given()
        own = manifest.model
        model: nn.Module = build_model(
            own.get("class"), own.get("config"), directory, len(manifest.slots)
        )
    if "generation_config.json" in manifest.files:
        path = file_of(directory, manifest, "generation_config.json")
        model.generation_config = generation_config(path)
    return model.eval()


@dataclass(frozen=True)
class _Reader:
    """Creates the tensors that go into the model, from any thread."""

    manifest: Manifest
    shards: MappedShards
    device: torch.device | str | None

    def value(self, wanted: Wanted, holders: list[Slot]) -> Tensor:
        """One tensor, or this rank's shard of it; a parameter if the module has one there."""
        name, sharding = wanted
        device = self.device
        if device is None:
            device = next((place for h in holders if (place := _place(h.tensor))), "cpu")
        if name in self.manifest.sharded or sharding is not None:
            tensor = self._assembled(name, sharding, device)
        elif name in self.manifest.packed:
            tensor = self._packed(self.manifest.packed[name], device)
        else:
            tensor = self._dense(name, device)
        if holders:
            tensor = with_part(holders[0].tensor, tensor)
        if all(holder.kind != "parameter" for holder in holders):
            return tensor
        part = local_part(tensor)
        packed = isinstance(part, PackedWeight)
        if isinstance(part, PackedWeight):
            part.memory.root.name = name
        trains = not packed and any(holder.tensor.requires_grad for holder in holders)
        return nn.Parameter(tensor, requires_grad=trains)

    def _dense(self, name: str, device: torch.device | str) -> Tensor:
        tensor = self.shards.tensor(name).to(device)
        # Compiled graphs copy unaligned tensors in every call.
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor

    def _packed(self, record: PackedRecord, device: torch.device | str) -> PackedWeight:
        weight = self.shards.packed(record)
        packed = PackedWeight.of(weight.to(device), DTYPES[record.dtype])
        if packed.qweight.data_ptr() != weight.qweight.data_ptr():
            self.shards.release(record.codes)
        return packed

    def _assembled(self, name: str, own: Sharding | None, device: torch.device | str) -> Tensor:
        """Assemble this rank's shard from the shards that any number of ranks wrote."""
        whole = PartsRecord(self.manifest.shape_of(name), 0, (name,), ((0, self._rows(name)),))
        parts = self.manifest.sharded.get(name, whole)
        blocks: dict[int, Block] = {}

        def part(number: int) -> Block:
            if number not in blocks:
                blocks[number] = self._block(parts.parts[number])
            return blocks[number]

        try:
            block = assemble(part, parts.sharding, own)
        except CheckpointError as error:
            raise CheckpointError(
                f"{name} was saved by {len(parts.parts)} ranks along dimension {parts.dim}, and "
                f"cannot be cut for {len(own.runs) if own else 1}: {error}; load it on as "
                "many ranks as saved it, or quantize it again with a granularity that divides "
                "what each rank holds"
            ) from error
        if isinstance(block, Tensor):
            return block.to(device).clone()
        record = next(r for n in parts.parts if (r := self.manifest.packed.get(n)))
        return PackedWeight.of(block.to(device), DTYPES[record.dtype])

    def _block(self, name: str) -> Block:
        record = self.manifest.packed.get(name)
        if record is None:
            return self.shards.tensor(name)
        return self.shards.packed(record)

    def _rows(self, name: str) -> int:
        return next(iter(self.manifest.shape_of(name)), 0)


def _place(tensor: Tensor) -> torch.device | str | None:
    """The device of the model's tensor; None if it is only on the meta device."""
    if is_dtensor(tensor):
        return tensor.device_mesh.device_type
    return None if tensor.is_meta else tensor.device
