"""The writer of a run over a checkpoint: quantized or unchanged tensors, and a journal.

The journal lists complete shards, so that a killed run can resume:

    {"identity": ..., "generation": ...}        of what, how
    {"shards": [...], "tensors": {...}, ...}    one line per finished shard

A line is appended when its shard is on disk. The shard of an incomplete last line is written again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from fqcompile.checkpoint.directory import staged
from fqcompile.checkpoint.manifest import (
    JOURNAL,
    PackedRecord,
    ShardRecord,
    SlotRecord,
    TensorRecord,
)
from fqcompile.checkpoint.model import slots
from fqcompile.checkpoint.shards import ShardWriter
from fqcompile.config import FineQuantConfig
from fqcompile.errors import CheckpointError, UnquantizableWeight
from fqcompile.files.safetensors_file import bytes_of
from fqcompile.files.trusted import append_to_file, remove, replace_durably, sync_directory
from fqcompile.files.untrusted import check_name, checked, parse_json, shown
from fqcompile.modules.quantize import site_of
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.quant.choose import choose_and_quantize, scale_dtype_beside
from fqcompile.report import Site
from fqcompile.weights.store import plain_eager

T = TypeVar("T")


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
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise CheckpointError(
                    f"{path} is not as {self.path.name} says; give overwrite=True (--overwrite) to "
                    "start anew"
                )


def _line(record: Any) -> bytes:
    return json.dumps(asdict(record), separators=(",", ":")).encode() + b"\n"


def _parsed(kind: type[T], line: bytes, where: str) -> T:
    found = parse_json(line, where, "give overwrite=True (--overwrite) to start anew")
    return checked(kind, found, where)


class StreamWriter:
    """Writes the tensors of a model, given by name in any order.

    Args:
        model: on the meta device; defines tied tensors, and which weights to quantize.
        given: the names that will be written; names tied to one of them share its value.
        done: progress of an earlier run.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FineQuantConfig,
        given: Iterable[str],
        directory: Path,
        journal: Journal,
        generation: str,
        done: Progress,
    ) -> None:
        self._config, self._journal = config, journal
        self._found = module_weights(model, config)
        self._places = places = {slot.name: slot for slot in slots(model)}
        self._identities = {name: id(slot.tensor) for name, slot in places.items()}
        self._groups: dict[int, list[str]] = {}
        for name, identity in self._identities.items():
            self._groups.setdefault(identity, []).append(name)
        self._receivers = _receivers(self._groups.values(), set(given))
        holders = {
            (id(module), attribute): found
            for found in self._found
            for module, attribute in found.holders
            if found.reason is None
        }
        self._packable = {
            name: holders[key]
            for name, slot in places.items()
            if (key := (id(slot.module), slot.attribute)) in holders
        }
        self._shards = ShardWriter(directory, generation, shards=done.shards, tensors=done.tensors)
        self.done = done
        self._waiting = Progress()
        self.weights = 0

    def has(self, names: Iterable[str]) -> bool:
        """Whether an earlier run wrote all of these."""
        return all(name in self.done.slots for name in names)

    def wrote(self, name: str) -> bool:
        """Whether there is a value for this name, even if it is in no shard yet."""
        return name in self.done.slots or name in self._waiting.slots

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor and its tied names; CheckpointError if the model's has another shape."""
        if self.wrote(name):
            return
        self._places[name].check_shape(tensor)
        names = self._receivers.get(name, [name])
        packed = [n for n in names if n in self._packable]
        if packed and not self._write_packed(packed, tensor):
            packed = []
        self._write_dense([n for n in names if n not in packed], tensor)
        if self._shards.is_full:
            self.flush()

    def flush(self) -> None:
        """Finish a shard, and record it in the journal."""
        tensors = self._shards.flush()
        if tensors:
            own = tuple(self._shards.shards[-1:])
            written = replace(self._waiting, shards=own, tensors=tensors)
            self._journal.note(written)
            self.done, self._waiting = self.done + written, Progress()

    def sites(self) -> tuple[Site, ...]:
        """The rows of the plan, in the order of the model."""
        rows = (self.done + self._waiting).sites
        return tuple(
            site_from(rows[f.name]) if f.name in rows else replace(site_of(f), reason=f.reason)
            for f in self._found
        )

    def _write_packed(self, names: list[str], tensor: Tensor) -> bool:
        """Quantize and write it; False, with the reason in its site, if its values forbid it."""
        found = replace(self._packable[names[0]], parameter=tensor)
        try:
            site, record = self._quantized(found, names[0])
        except UnquantizableWeight as error:
            if self._config.on_unsupported == "error":
                raise UnquantizableWeight(f"{found.name}: {error}") from error
            site, record = replace(site_of(found), reason=str(error)), None
        self._waiting += Progress(sites={found.name: site.as_dict()})
        if record is not None:
            targets = {name: SlotRecord("parameter", names[0]) for name in names}
            self._waiting += Progress(packed={names[0]: record}, slots=targets)
        return record is not None

    def _quantized(self, found: ModuleWeight, name: str) -> tuple[Site, PackedRecord]:
        weight = found.weight
        options = self._config.site_options(found.name, head=found.head)
        scale_dtype = scale_dtype_beside(weight.dtype)
        with plain_eager(weight.device.type):
            plan, codes = choose_and_quantize(found.matrix, options, scale_dtype)
        self.weights += weight.numel()
        codes = codes.changed(transposed=found.transposed)
        record = self._shards.add_packed(name, codes, weight.dtype)
        site = replace(
            site_of(found),
            status="quantized",
            bits=plan.bits,
            levels=plan.levels,
            group_size=plan.group_size,
            bytes_after=codes.nbytes,
            relative_error=plan.relative_error,
            expert_errors=plan.expert_errors or None,
        )
        return site, record

    def _write_dense(self, names: list[str], tensor: Tensor) -> None:
        if not names:
            return
        value = self._same_value(names[0], tensor)
        if value is None:
            value = names[0]
            self._shards.add({value: tensor})
        self._waiting += Progress(slots={n: SlotRecord(self._places[n].kind, value) for n in names})

    def _same_value(self, name: str, tensor: Tensor) -> str | None:
        """The value of a tied name, if the checkpoint has it twice with equal values."""
        group = self._groups[self._identities[name]]
        if len(group) == 1:
            return None
        self.flush()
        digest = hashlib.sha256(bytes_of(tensor.contiguous())).hexdigest()
        values = {slot.value for n in group if (slot := self.done.slots.get(n))}
        records = [(value, self.done.tensors.get(value)) for value in sorted(values)]
        return next((value for value, r in records if r and r.sha256 == digest), None)


def _receivers(groups: Iterable[list[str]], given: set[str]) -> dict[str, list[str]]:
    """For each given name, itself; for the first of a tied group, also the names not given."""
    result = {}
    for names in groups:
        present = [name for name in names if name in given]
        result.update({name: [name] for name in present})
        if present:
            result[present[0]] = [present[0], *(name for name in names if name not in given)]
    return result


def site_from(row: Mapping[str, Any]) -> Site:
    """The row of a plan that `Site.as_dict` wrote.

    Raises:
        CheckpointError: the row was not written by it.
    """
    check_name(row.get("name"), "a site of the plan")
    try:
        errors = row["expert_errors"]
        lists = {"shape": tuple(row["shape"]), "expert_errors": errors and tuple(errors)}
        return Site(**{**row, **lists})
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"site {row['name']} of the plan is not what was written ({shown(error)}); save the "
            "model again"
        ) from error
