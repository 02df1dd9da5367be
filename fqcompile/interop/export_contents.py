"""A saved directory, and the destination of the rows of its packed weights in a checkpoint.

The converters of transformers are run on a column of row numbers instead of the weight, so that
splits, reorderings and renamings are known before any code is read:

    experts.gate_up_proj [E, 2I, K]: rows 0, 1, 2, ...  ->  experts.0.gate_proj: rows 0 .. I-1, ...
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fqcompile.checkpoint.conversion import Reversion, reversions
from fqcompile.checkpoint.directory import check_not_written_over
from fqcompile.checkpoint.hugging_face import build_model
from fqcompile.checkpoint.manifest import Manifest, read_manifest
from fqcompile.checkpoint.packed_record import PackedRecord
from fqcompile.checkpoint.shards import MappedShards
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import DTYPES
from fqcompile.tensor.quantized import QuantizedTensor


@dataclass(frozen=True)
class Saved:
    """The contents of a saved directory, and its model on the meta device."""

    directory: Path
    manifest: Manifest
    model: Any
    shards: MappedShards = field(repr=False)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Reads no tensor.

        Raises:
            CheckpointError: the directory is incomplete, was saved by several ranks, or its model
                is not a Hugging Face model.
        """
        manifest = read_manifest(directory)
        check_not_written_over(directory, manifest)
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
                f"{directory} holds no quantized weight; there is nothing to export"
            )
        return cls(directory, manifest, model, MappedShards(directory, manifest))

    @cached_property
    def values(self) -> dict[str, str]:
        """The value of each name of the state dict; for tied names only the first."""
        slots = self.manifest.slots
        lost = [name for name in self.model.state_dict() if name not in slots]
        if lost:
            raise CheckpointError(f"{self.directory} has no value for {', '.join(lost[:3])}")
        return {
            name: slots[name].value for name in self.model.state_dict() if name not in self.tied
        }

    @cached_property
    def tied(self) -> frozenset[str]:
        """Names that loading ties to others; empty if one of them has a value of its own."""
        return frozenset() if self.untied else frozenset(self.ties)

    @property
    def untied(self) -> bool:
        """Whether a name that the model's config ties has a value of its own: a quantized head."""
        slots = self.manifest.slots
        return any(slots[a].value != slots[b].value for a, b in self.ties.items())

    @property
    def ties(self) -> dict[str, str]:
        """Names that the model's config ties, and to what: heads to embeddings."""
        slots, ties = self.manifest.slots, self.model.all_tied_weights_keys
        return {a: b for a, b in ties.items() if a in slots and b in slots}

    @cached_property
    def dtype(self) -> str:
        """The most common dtype of packed weights, by its safetensors name: engines run in it."""
        counts = Counter(record.dtype for record in self.manifest.packed.values())
        return counts.most_common(1)[0][0]

    def record(self, value: str) -> PackedRecord | None:
        """Of a packed value."""
        return self.manifest.packed.get(value)

    def packed(self, value: str) -> QuantizedTensor:
        """Codes and scales, rows [N, K] or [E * N, K]; mapped files."""
        return self.shards.packed(self.manifest.packed[value])

    def release(self, value: str) -> None:
        """Release the memory pages of a value that was read."""
        record = self.record(value)
        for name in (value,) if record is None else (record.codes, record.scale):
            self.shards.release(name)


Rows = slice | Tensor  # a slice where they follow each other
# Engines build these as one linear for each expert and projection where they are quantized.
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_PER_EXPERT = frozenset({"Llama4TextExperts"})


@dataclass(frozen=True, eq=False)
class Piece:
    """A layer of the checkpoint: some rows of a packed weight.

    `source` is the weight's name in the model, `name` the layer's in the checkpoint.
    """

    name: str
    source: str
    value: str
    rows: Rows
    n: int
    k: int


@dataclass(frozen=True)
class Whole:
    """Dense tensors of the checkpoint that are computed together from tensors of the model."""

    reversion: Reversion
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint; `reasons`, by value: why a packed weight is written dense."""

    pieces: tuple[Piece, ...]
    wholes: tuple[Whole, ...]
    reasons: Mapping[str, str]

    @property
    def dense_stacks(self) -> set[str]:
        """Expert modules that are also stored as one tensor in the checkpoint."""
        tensors = (item for whole in self.wholes for item in whole.tensors.items())
        return {name.rpartition(".")[0] for name, (_, shape) in tensors if len(shape) == 3}


def contents_of(saved: Saved) -> Contents:
    """Reads no tensor.

    Raises:
        CheckpointError: the model's converters do not take its tensors.
    """
    values = saved.values
    pieces: list[Piece] = []
    wholes: list[Whole] = []
    reasons: dict[str, str] = {}
    for reversion in reversions(saved.model, values):
        split = _per_expert(saved, reversion, values)
        if split is not None:
            pieces += split
            continue
        packed = [name for name in reversion.names if saved.record(values[name]) is not None]
        reason = _unsplittable(saved, reversion, values) if packed else None
        if packed and reason is None:
            found = _pieces(saved, reversion, values)
            if found is not None:
                pieces += found
                continue
            reason = "the checkpoint's layout has no matrix [N, K] for it"
        wholes.append(_whole(saved, reversion, values))
        reasons.update({values[name]: reason for name in packed if reason is not None})
    return Contents(tuple(pieces), tuple(wholes), reasons)


def _unsplittable(saved: Saved, reversion: Reversion, values: Mapping[str, str]) -> str | None:
    records = [saved.record(values[name]) for name in reversion.names]
    if any(record is None for record in records):
        return "the checkpoint joins it with weights that are not quantized"
    if len(records) > 1 and reversion.converter is not None:
        return "the checkpoint joins it with other weights"
    if any(record is not None and record.transposed for record in records):
        return "it is [K, N] in the checkpoint, and the format holds [N, K]"
    return None


def _pieces(saved: Saved, reversion: Reversion, values: Mapping[str, str]) -> list[Piece] | None:
    (source,) = reversion.names
    record = saved.manifest.packed[values[source]]
    results = reversion.run(saved.model, {source: _row_numbers(record)})
    found = []
    for name, rows in results.items():
        module, _, parameter = name.rpartition(".")
        is_matrix = rows.dim() == 2 and torch.equal(rows, rows[:, :1].repeat(1, 2))
        if parameter != "weight" or not is_matrix:
            return None
        n = rows.shape[0]
        found.append(Piece(module, source, values[source], _slice(rows[:, 0]), n, record.k))
    return found


def _per_expert(
    saved: Saved, reversion: Reversion, values: Mapping[str, str]
) -> list[Piece] | None:
    """Whether it is a stack whose experts are separate linears only in quantized checkpoints."""
    source = reversion.names[0]
    stack, _, parameter = source.rpartition(".")
    record = saved.record(values[source])
    kind = type(saved.model.get_submodule(stack)).__name__
    if record is None or kind not in _PER_EXPERT or not record.experts:
        return None
    projections = _PROJECTIONS[parameter]
    n = record.rows // len(projections)
    names = [f"{e}.{own}" for e in range(record.experts) for own in projections]
    prefix = reversion.target.rpartition(".")[0]
    return [
        Piece(f"{prefix}.{name}", source, values[source], slice(i * n, i * n + n), n, record.k)
        for i, name in enumerate(names)
    ]


def _row_numbers(record: PackedRecord) -> Tensor:
    """Convert row numbers as two columns: transformers 5.17 squeezes a single one in a split."""
    numbers = torch.arange(record.all_rows, dtype=torch.int32).view(-1, 1).repeat(1, 2)
    return numbers.view(*((record.experts,) if record.experts else ()), record.rows, 2)


def _slice(rows: Tensor) -> Rows:
    first, n = int(rows[0]), len(rows)
    together = torch.equal(rows, torch.arange(first, first + n, dtype=rows.dtype))
    return slice(first, first + n) if together else rows.long()


def _whole(saved: Saved, reversion: Reversion, values: Mapping[str, str]) -> Whole:
    tensors = {name: _meta(saved, values[name]) for name in reversion.names}
    results = reversion.run(saved.model, tensors)
    return Whole(reversion, {n: (t.dtype, tuple(t.shape)) for n, t in results.items()})


def _meta(saved: Saved, value: str) -> Tensor:
    record = saved.record(value) or saved.manifest.tensors.get(value)
    if record is None:
        raise CheckpointError(f"{saved.directory} has no tensor {value}")
    return torch.empty(record.shape, dtype=DTYPES[record.dtype], device="meta")
