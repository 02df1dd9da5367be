"""load: open a saved model, or a checkpoint quantized by another program, with packed weights."""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqcompile.checkpoint.conversion import Conversion, initialize, target_types
from fqcompile.checkpoint.hugging_face import generation_config
from fqcompile.checkpoint.load import load_saved
from fqcompile.checkpoint.manifest import MANIFEST
from fqcompile.checkpoint.model import CheckpointModel, Slot, shortened, slots
from fqcompile.checkpoint.packed_record import METHOD, read_packed
from fqcompile.checkpoint.source import Source, read_config, read_tensors, recognized, weight_files
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import TensorPlace, read_tensor
from fqcompile.files.untrusted import shown
from fqcompile.hf_compat import rules_of_ties, untie
from fqcompile.interop.assemble import ForeignLayer, assemble
from fqcompile.interop.compressed_tensors import read_compressed_tensors
from fqcompile.interop.gptq_awq import read_awq, read_gptq
from fqcompile.tensor.format import INT8
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.parameter import PackedWeight

log = logging.getLogger("fqcompile")

Reader = Callable[[Mapping[str, Any], Mapping[str, TensorPlace], str], dict[str, ForeignLayer]]
_Function = Callable[[], Any] | None  # the caller's, that builds the model
READERS: dict[str, Reader] = {
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
}


def load(
    model_or_factory: nn.Module | Callable[[], nn.Module] | None,
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> nn.Module:
    """Load a model from a directory of `save` or `fqcompile quantize`, or a quantized checkpoint.

    Dense tensors are private memory maps of the files, so changes to them are not written back.
    Packed weights are read once, into the layout of this machine's kernels.
    What `save_pretrained` wrote, and checkpoints of compressed-tensors (pack-quantized), GPTQ
    without act-order and AWQ can also be loaded, with None or a function. If the model's parameters
    are DTensors, each rank loads its own shards, whatever the number of ranks that saved the model;
    all ranks must call this function.

    Args:
        model_or_factory: a function without arguments, called on the meta device, so that no dense
            copy of the weights is ever allocated. Or a model, on the meta device or not, whose
            tensors are replaced. Or None: the Hugging Face class that was saved, in eval mode.
        device: device of the weights; by default the device of each tensor in the model or its
            mesh, and the CPU for tensors on the meta device.
        verify: compare the checksum of every tensor, about a second per GiB.

    Returns:
        The model, with the dtype that was saved. Train mode and `requires_grad` are as the factory
        set them; packed weights never require gradients.

    Raises:
        CheckpointError: the directory is incomplete, damaged, of another format version or of
            another model; the message names files and tensors. A model that was passed in is
            unchanged.
    """
    if not isinstance(directory, str | os.PathLike):  # the two are easily swapped
        raise CheckpointError(
            f"load got a {type(directory).__name__} in place of a directory; give the model, a "
            "function that makes one, or None first, and the directory second"
        )
    target = Path(directory)
    if (target / MANIFEST).is_file():
        model = load_saved(model_or_factory, target, device=device, verify=verify)
    else:
        model = _load_of_others(model_or_factory, target, torch.device(device or "cpu"))
    untie(model)
    return model


def _load_of_others(given: object, directory: Path, device: torch.device) -> nn.Module:
    """Load a directory that fqcompile did not write."""
    config = _quantized_config(directory)
    if config is None:
        raise CheckpointError(f"{directory} has no {MANIFEST}: {recognized(directory)}")
    if given is not None and (isinstance(given, nn.Module) or not callable(given)):
        raise CheckpointError(
            f"load got a {type(given).__name__}, and {directory} has no {MANIFEST}: give None, for "
            "the class of transformers that its config names, or a function that builds the model"
        )
    try:
        return _loaded(directory, config, device, given)
    except CheckpointError as error:
        if str(directory) in str(error):
            raise
        raise CheckpointError(f"{directory}: {error}") from error


def _quantized_config(directory: Path) -> dict[str, Any] | None:
    """The content of its `config.json`, if that has a quantization_config."""
    if not (directory / "config.json").is_file():
        return None
    config = read_config(directory)
    return config if config.get("quantization_config") else None


def _loaded(
    directory: Path, config: dict[str, Any], device: torch.device, function: _Function
) -> nn.Module:
    """Build the model with the checkpoint's codes unchanged; no dense weight is created."""
    method = _method(config, directory)
    if method == METHOD:
        return _load_own(directory, config, device, function)
    tensors = read_tensors(directory)
    layers = READERS[method](config, tensors, str(directory / "config.json"))
    weights = {f"{name}.weight": layer for name, layer in layers.items()}
    source = Source(directory, config, _as_if_dense(tensors, layers))
    model, given = _built(source, partial(_values, weights), device, function)
    _tell_of_zero_points(layers, given)
    return model


def _load_own(
    directory: Path, config: dict[str, Any], device: torch.device, function: _Function
) -> nn.Module:
    """Of `save_pretrained`, which writes no manifest; its names are the model's."""
    tensors, records = read_packed(weight_files(directory))
    parts = {name for r in records.values() for name in (r.codes, r.scale)}
    found = {name: place for name, place in tensors.items() if name not in parts}
    for name, record in records.items():
        found[name] = TensorPlace(directory, record.dtype, record.shape, 0, 0)

    def values(step: Conversion, work: CheckpointModel, dtype: torch.dtype) -> dict[str, Tensor]:
        record = records.get(step.names[0])
        if record is None:
            return work.convert(step, dtype)
        codes, scale = (read_tensor(tensors[name]) for name in (record.codes, record.scale))
        weight = QuantizedTensor.of_rows(codes, scale, record.format)
        return {step.target: PackedWeight.of(weight, dtype)}

    return _built(Source(directory, config, found), values, device, function)[0]


def _built(
    source: Source,
    values_of: Callable[..., dict[str, Tensor]],
    device: torch.device,
    function: _Function,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with all values, and those of the checkpoint; `values_of` a step of conversion."""
    work = CheckpointModel.of(source, None, function)
    if work.unused:
        log.warning("left out, as %s has no place for them: %s", work.name, shortened(work.unused))
    model = work.model
    initialize(model, work.missing, source.directory)
    places = {slot.name: slot for slot in slots(model)}
    types = target_types(model, work.dtype)
    given: dict[str, Tensor] = {}
    for step in work.steps:
        given |= values_of(step, work, types(step.target))
    _put_all(model, places, given, device)
    path = source.directory / "generation_config.json"
    if path.is_file():
        model.generation_config = generation_config(path)
    return model.eval(), given


def _tell_of_zero_points(layers: Mapping[str, ForeignLayer], given: Mapping[str, Tensor]) -> None:
    """Warn if asymmetric int4 weights had to be stored as int8, which takes more memory."""
    wide = [
        n for n, v in given.items() if isinstance(v, PackedWeight) and v.format.bits == INT8.bits
    ]
    zeros = any("zero" in part for layer in layers.values() for part in layer.places)
    if wide and zeros:
        log.warning(
            "%d weights are held as int8 codes, as their codes less zero points fit no int4: %s",
            len(wide), shortened(wide),
        )  # fmt: skip


def _method(config: Mapping[str, Any], directory: Path) -> str:
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if not isinstance(method, str) or method not in (METHOD, *READERS):
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config.quant_method is "
            f"{shown(repr(method))}; this opens {', '.join((METHOD, *READERS))}; give the "
            "checkpoint that it was made from to: fqcompile quantize CHECKPOINT OUT"
        )
    return method


def _as_if_dense(
    tensors: Mapping[str, TensorPlace], layers: Mapping[str, ForeignLayer]
) -> dict[str, TensorPlace]:
    """Names as the converters of transformers know them: one weight [N, K] for each layer."""
    parts = {place for layer in layers.values() for place in layer.places.values()}
    found = {name: place for name, place in tensors.items() if place not in parts}
    for layer in layers.values():
        place = next(iter(layer.places.values()))
        weight = TensorPlace(place.path, layer.scale_dtype, (layer.n, layer.k), 0, 0)
        found[f"{layer.name}.weight"] = weight
    return found


def _values(
    weights: Mapping[str, ForeignLayer],
    step: Conversion,
    work: CheckpointModel,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The model's tensors that a step produces."""
    packed = [name for name in step.names if name in weights]
    if not packed:
        return work.convert(step, dtype)
    if len(packed) < len(step.names):
        dense = next(name for name in step.names if name not in weights)
        raise CheckpointError(
            f"{packed[0]} is packed and {dense} is not, and both are {step.target} in the model"
        )
    return {step.target: assemble(step, work.model, weights, dtype)}


def _put_all(
    model: nn.Module, places: Mapping[str, Slot], given: Mapping[str, Tensor], device: torch.device
) -> None:
    """Assign each value to its slot, and to tied slots without a value of their own."""
    tied: dict[int, list[Slot]] = {}
    for slot in places.values():
        tied.setdefault(id(slot.tensor), []).append(slot)
    values = {name: _value(places[name], value, device) for name, value in given.items()}
    ties = rules_of_ties(model)
    lost = []
    for group in tied.values():
        first = next((slot.name for slot in group if slot.name in given), None)
        for slot in group:
            # Beside a packed head, other tables are tied to the dense one.
            owner = slot.name if slot.name in given else ties.get(slot.name, slot.name)
            if first is not None:
                slot.put(values[owner if owner in given else first])
            elif slot.tensor.is_meta:
                lost.append(slot.name)
            else:
                slot.put(slot.tensor.to(device))
    if lost:
        raise CheckpointError(f"no tensor of the checkpoint gives {shortened(lost)} a value")


def _value(slot: Slot, value: Tensor, device: torch.device) -> Tensor:
    slot.check_shape(value)
    moved = value.to(device)
    if isinstance(moved, PackedWeight):
        moved.memory.root.name = slot.name
    return nn.Parameter(moved, requires_grad=False) if slot.kind == "parameter" else moved
