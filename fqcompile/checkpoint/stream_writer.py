"""The writer of a run over a checkpoint: quantized or unchanged tensors, and a journal of them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fqcompile.checkpoint.journal import Journal, Progress
from fqcompile.checkpoint.manifest import Manifest, SlotRecord
from fqcompile.checkpoint.model import slots
from fqcompile.checkpoint.shards import MappedShards, ShardWriter
from fqcompile.config import FineQuantConfig
from fqcompile.errors import CheckpointError, UnquantizableWeight
from fqcompile.files.safetensors_file import bytes_of
from fqcompile.files.untrusted import check_name, shown
from fqcompile.modules.gptq import WeightsInputs, compensated
from fqcompile.modules.quantize import site_of
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.passes.summary import said_of
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.choose import choose_and_quantize, scale_dtype_beside
from fqcompile.report import Site
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.store import plain_eager


class StreamWriter:
    """Writes the tensors of a model, given by name in any order.

    Args:
        model: on the meta device; defines tied tensors, and which weights to quantize.
        given: the names that will be written; names tied to one of them share its value.
        done: progress of an earlier run.

    Attributes:
        found: the weights of the model.
        calibrations: what weights are quantized with, by name.
        inputs: for GPTQ, those of weights that `write` gets.
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
        self.found = module_weights(model, config)
        self._places = places = {slot.name: slot for slot in slots(model)}
        self._identities = {name: id(slot.tensor) for name, slot in places.items()}
        self._groups: dict[int, list[str]] = {}
        for name, identity in self._identities.items():
            self._groups.setdefault(identity, []).append(name)
        self._receivers = _receivers(self._groups.values(), set(given))
        holders = {
            (id(module), attribute): found
            for found in self.found
            for module, attribute in found.holders
            if found.reason is None
        }
        self._packable = {
            name: holders[key]
            for name, slot in places.items()
            if (key := (id(slot.module), slot.attribute)) in holders
        }
        self._shards = ShardWriter(directory, generation, shards=done.shards, tensors=done.tensors)
        self._directory, self.done = directory, done
        self._waiting = Progress()
        self.calibrations: Mapping[str, Calibration] = {}
        self.inputs: WeightsInputs | None = None
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
        names = [n for n in self._receivers.get(name, [name]) if not self.wrote(n)]
        packed = [n for n in names if n in self._packable]
        if packed and self._write_packed(packed, tensor, self.inputs) is None:
            packed = []
        self._write_dense([n for n in names if n not in packed], tensor)
        if self._shards.is_full:
            self.flush()

    def pack(self, found: ModuleWeight, inputs: WeightsInputs) -> QuantizedTensor | None:
        """Quantize a weight that is there, and write it unless it is written; None if it stays.

        Its tied names get it too; those that read it as a table are left to `write`.
        """
        names = next(names for names in self._receivers.values() if found.name in names)
        packed = [n for n in names if n in self._packable]
        if self.wrote(packed[0]):
            return self._quantized(found, inputs)[1]
        codes = self._write_packed(packed, found.parameter, inputs)
        if self._shards.is_full:
            self.flush()
        return codes

    def packed_before(self, name: str) -> QuantizedTensor | None:
        """The codes of an earlier run, of which it `has` the name; None if it stayed."""
        record = self.done.packed.get(self.done.slots[name].value)
        if record is None:
            return None
        manifest = Manifest(
            generation="", versions={}, model={}, options={}, sites=(), shards=self.done.shards,
            tensors=self.done.tensors, packed=self.done.packed, slots=self.done.slots, files=(),
        )  # fmt: skip
        return MappedShards(self._directory, manifest).packed(record)

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
            for f in self.found
        )

    def _write_packed(
        self, names: list[str], tensor: Tensor, inputs: WeightsInputs | None
    ) -> QuantizedTensor | None:
        """Quantize and write it; None, with the reason in its site, if its values forbid it."""
        found = replace(self._packable[names[0]], parameter=tensor)
        codes = None
        try:
            site, codes = self._quantized(found, inputs)
        except UnquantizableWeight as error:
            if self._config.on_unsupported == "error":
                raise UnquantizableWeight(f"{found.name}: {error}") from error
            site = replace(site_of(found), reason=str(error))
        self._waiting += Progress(sites={found.name: site.as_dict()})
        if codes is not None:
            self.weights += tensor.numel()
            record = self._shards.add_packed(names[0], codes, tensor.dtype)
            targets = {name: SlotRecord("parameter", names[0]) for name in names}
            self._waiting += Progress(packed={names[0]: record}, slots=targets)
        return codes

    def _quantized(
        self, found: ModuleWeight, inputs: WeightsInputs | None
    ) -> tuple[Site, QuantizedTensor]:
        weight, calibration = found.weight, self.calibrations.get(found.name)
        options = self._config.site_options(found.name, head=found.head)
        h = None if calibration is None else calibration.h
        with plain_eager(weight.device.type):
            made = choose_and_quantize(found.matrix, options, scale_dtype_beside(weight.dtype), h)
            plan, codes = replace(made[0], calibration=calibration), made[1]
            if inputs is not None:
                plan, codes = compensated(found, (plan, codes), inputs, options.error_budget)
        codes = codes.changed(transposed=found.transposed)
        site = replace(
            site_of(found),
            status="quantized",
            bits=plan.bits,
            levels=plan.levels,
            group_size=plan.group_size,
            bytes_after=codes.nbytes,
            **said_of(plan),
        )
        return site, codes

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
