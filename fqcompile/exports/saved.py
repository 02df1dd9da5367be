"""A directory of `fqcompile.save` or `fqcompile quantize`, read one tensor at a time."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fqcompile.checkpoint.hugging_face import build_model
from fqcompile.checkpoint.manifest import Manifest, PackedRecord, read_manifest
from fqcompile.checkpoint.shards import MappedShards
from fqcompile.errors import CheckpointError
from fqcompile.quant.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class Saved:
    """What is in it, and its model on the meta device."""

    directory: Path
    manifest: Manifest
    model: Any
    _shards: MappedShards = field(repr=False)
    _verified: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Reads no tensor.

        Raises:
            CheckpointError: the directory is not whole or was saved in parts, or its model is none
                of Hugging Face.
        """
        manifest = read_manifest(directory)
        if manifest.sharded:
            raise CheckpointError(
                f"{directory} was saved by several ranks, in parts; export reads whole weights: "
                "fqcompile.save(fqcompile.load(None, directory), other) on one rank makes them"
            )
        with torch.device("meta"):
            own = manifest.model
            model = build_model(own.get("class"), own.get("config"), directory, len(manifest.slots))
        if not manifest.packed:
            raise CheckpointError(
                f"{directory} holds no quantised weight; there is nothing to export"
            )
        return cls(directory, manifest, model, MappedShards(directory, manifest))

    @cached_property
    def values(self) -> dict[str, str]:
        """For each name of the state dict: the value that it has. Of tied names only the first."""
        slots = self.manifest.slots
        lost = [name for name in self.model.state_dict() if name not in slots]
        if lost:
            raise CheckpointError(f"{self.directory} has no value for {', '.join(lost[:3])}")
        return {
            name: slots[name].value for name in self.model.state_dict() if name not in self.tied
        }

    @cached_property
    def tied(self) -> frozenset[str]:
        """Names that loading ties to others; none where one of them has a value of its own."""
        return frozenset() if self.untied else frozenset(self.ties)

    @property
    def untied(self) -> bool:
        """Whether a name that the model's config ties has a value of its own: a quantised head."""
        slots = self.manifest.slots
        return any(slots[a].value != slots[b].value for a, b in self.ties.items())

    @property
    def ties(self) -> dict[str, str]:
        """Names that the model's config ties, and to what: heads to embeddings."""
        slots, ties = self.manifest.slots, self.model.all_tied_weights_keys
        return {a: b for a, b in ties.items() if a in slots and b in slots}

    @cached_property
    def dtype(self) -> str:
        """The type of most packed weights, by its name in safetensors: what engines run in."""
        counts = Counter(record.dtype for record in self.manifest.packed.values())
        return counts.most_common(1)[0][0]

    def record(self, value: str) -> PackedRecord | None:
        """Of a packed value."""
        return self.manifest.packed.get(value)

    def packed(self, value: str) -> QuantizedWeight:
        """Codes and scales, rows [N, K] or [E * N, K]; mapped files."""
        record = self.manifest.packed[value]
        codes, scale = self._tensor(record.codes), self._tensor(record.scale)
        shape = (record.all_rows, record.k)
        return QuantizedWeight(codes, scale, record.bits, record.group_size, shape)

    def dense(self, value: str) -> Tensor:
        """A tensor that was not packed; a mapped file."""
        return self._tensor(value)

    def release(self, value: str) -> None:
        """The memory of what was read of a value."""
        record = self.record(value)
        for name in (value,) if record is None else (record.codes, record.scale):
            self._shards.release(name)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._shards.tensor(name, verify=name not in self._verified)
        self._verified.add(name)
        return tensor
