"""load: a saved model, packed as this machine's kernels want it; nothing is quantised again."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fqcompile.checkpoint.directory import file_of
from fqcompile.checkpoint.fit import check_fits, put
from fqcompile.checkpoint.hugging_face import generation_config, model_from_config
from fqcompile.checkpoint.manifest import MANIFEST, Manifest, PackedRecord, read_manifest
from fqcompile.checkpoint.safetensors_file import ALIGNMENT, DTYPES
from fqcompile.checkpoint.shards import MappedShards
from fqcompile.checkpoint.slots import Slot, slots
from fqcompile.errors import CheckpointError
from fqcompile.imports.load import is_quantized_checkpoint, load_quantized
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.packed_weight import PackedWeight

# One compares checksums while the other packs.
_READERS = 2


def load(
    model_or_factory: nn.Module | Callable[[], nn.Module] | None,
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> nn.Module:
    """A model with the weights that `save` or `fqcompile quantize` wrote, or others quantised.

    Dense tensors are the mapped files themselves: privately, so a change to one is not written
    back. Packed ones are read once, into the order that the kernels of this machine want.

    compressed-tensors (pack-quantized), GPTQ without act-order and AWQ open too, for None.

    Args:
        model_or_factory: a function without arguments, called on the meta device, so that no dense
            copy of the weights is ever made. Or a model, on the meta device or not, whose tensors
            are replaced. Or None: the class of Hugging Face that was saved, in eval mode.
        device: for the weights; by default each goes where the model has it, and to the CPU from
            the meta device.
        verify: compare the checksum of every tensor, about a second per GiB.

    Returns:
        The model, which requires gradients and trains or not as the factory left it; packed weights
        do not. It runs in the type that was saved.

    Raises:
        CheckpointError: the directory is not whole or not what was written, is of another version,
            or of another model; files and tensors are named, and a model that was given is as it
            was.
    """
    target = Path(directory)
    if not (target / MANIFEST).is_file() and is_quantized_checkpoint(target):
        _check_no_model(model_or_factory, target)
        return load_quantized(target, device)
    manifest, shards = _open(target)
    model = _model(model_or_factory, manifest, target)
    places = {slot.name: slot for slot in slots(model)}
    check_fits(manifest, places, model, target)
    holders: dict[str, list[Slot]] = {record.value: [] for record in manifest.slots.values()}
    for name, record in manifest.slots.items():
        holders[record.value] += [places[name]] if name in places else []
    reader = _Reader(manifest, shards, device, verify)
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(reader.value, holders, holders.values())
        # All are there and right before any is put: a refused directory leaves the model alone.
        values = dict(zip(holders, found, strict=True))
    for name, record in manifest.slots.items():
        put(model, places.get(name), name, values[record.value])
    return model


def _check_no_model(given: object, directory: Path) -> None:
    if given is not None:
        raise CheckpointError(
            f"{directory} was not written by fqcompile, and its names are translated for the class "
            "that its config names: give None in place of a model"
        )


def _open(directory: Path) -> tuple[Manifest, MappedShards]:
    """Again where a writer replaced the files between the manifest and them."""
    manifest = read_manifest(directory)
    while True:
        try:
            return manifest, MappedShards(directory, manifest)
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
        model: nn.Module = model_from_config(
            manifest.model["class"], manifest.model["config"], directory
        )
    if "generation_config.json" in manifest.files:
        path = file_of(directory, manifest, "generation_config.json")
        model.generation_config = generation_config(path)
    return model.eval()


@dataclass(frozen=True)
class _Reader:
    """Makes what goes into the model, from any thread."""

    manifest: Manifest
    shards: MappedShards
    device: torch.device | str | None
    verify: bool

    def value(self, name: str, holders: list[Slot]) -> Tensor:
        """One value, as a parameter where a module holds it as one."""
        device = self.device
        if device is None:
            device = next((h.tensor.device for h in holders if not h.tensor.is_meta), "cpu")
        record = self.manifest.packed.get(name)
        tensor = self._dense(name, device) if record is None else self._packed(record, device)
        if all(holder.kind != "parameter" for holder in holders):
            return tensor
        trains = record is None and any(holder.tensor.requires_grad for holder in holders)
        return nn.Parameter(tensor, requires_grad=trains)

    def _dense(self, name: str, device: torch.device | str) -> Tensor:
        tensor = self.shards.tensor(name, verify=self.verify).to(device)
        # Compiled graphs copy what lies askew, in every call.
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor

    def _packed(self, record: PackedRecord, device: torch.device | str) -> PackedWeight:
        names = (record.codes, record.scale)
        codes, scale = (self.shards.tensor(name, verify=self.verify) for name in names)
        shape = (record.all_rows, record.k)
        tensors = (codes.to(device), scale.to(device))
        packed = PackedWeight.of(
            QuantizedWeight(*tensors, record.bits, record.group_size, shape),
            dtype=DTYPES[record.dtype],
            experts=record.experts,
            transposed=record.transposed,
            scale_method=record.scale_method,
        )
        if packed.qweight.data_ptr() != codes.data_ptr():
            self.shards.release(record.codes)
        return packed
