"""load_quantized: what others quantised, as a model of Hugging Face with packed weights."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqcompile.checkpoint.checkpoint_model import CheckpointModel
from fqcompile.checkpoint.conversion import Conversion, initialise, target_types
from fqcompile.checkpoint.fit import shortened
from fqcompile.checkpoint.hugging_face import generation_config
from fqcompile.checkpoint.json_text import shown
from fqcompile.checkpoint.safetensors_file import TensorPlace, read_tensor
from fqcompile.checkpoint.slots import Slot, slots
from fqcompile.checkpoint.source import Source, read_config, read_tensors
from fqcompile.errors import CheckpointError
from fqcompile.imports.assemble import assemble
from fqcompile.imports.awq import read_awq
from fqcompile.imports.compressed_tensors import read_compressed_tensors
from fqcompile.imports.gptq import read_gptq
from fqcompile.imports.packed_layer import PackedLayer
from fqcompile.quant.qtype import INT8
from fqcompile.weights.packed_weight import PackedWeight

log = logging.getLogger("fqcompile")

Reader = Callable[[Mapping[str, Any], Mapping[str, TensorPlace], str], dict[str, PackedLayer]]
READERS: dict[str, Reader] = {
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
}


def quantized_config(directory: Path) -> dict[str, Any] | None:
    """The content of its `config.json`, if that says that somebody quantized it."""
    if not (directory / "config.json").is_file():
        return None
    config = read_config(directory)
    return config if config.get("quantization_config") else None


def load_quantized(
    directory: Path, config: dict[str, Any], device: torch.device | str | None = None
) -> nn.Module:
    """The class that the config names, in eval mode, on `device` (by default the CPU).

    Codes stay as they are; no dense weight is made of them. `config` is that of the directory.

    Raises:
        CheckpointError: the format is none of these or has no exact conversion, files are damaged,
            or the model is no class of transformers; file and key are named.
    """
    try:
        return _loaded(directory, config, torch.device(device or "cpu"))
    except CheckpointError as error:
        if str(directory) in str(error):
            raise
        raise CheckpointError(f"{directory}: {error}") from error


def _loaded(directory: Path, config: dict[str, Any], device: torch.device) -> nn.Module:
    tensors = read_tensors(directory)
    layers = _reader(config, directory)(config, tensors, str(directory / "config.json"))
    work = CheckpointModel.of(_as_if_dense(directory, config, tensors, layers), None)
    if work.unused:
        log.warning("left out, as %s has no place for them: %s", work.name, shortened(work.unused))
    model = work.model
    initialise(model, work.missing, directory)
    places = {slot.name: slot for slot in slots(model)}
    types = target_types(model, work.dtype)
    weights = {f"{name}.weight": layer for name, layer in layers.items()}
    given: dict[str, Tensor] = {}
    for step in work.steps:
        given |= _values(step, work, weights, types(step.target))
    _put_all(places, given, device)
    _tell_of_zero_points(layers, given)
    path = directory / "generation_config.json"
    if path.is_file():
        model.generation_config = generation_config(path)
    return model.eval()  # type: ignore[no-any-return]


def _tell_of_zero_points(layers: Mapping[str, PackedLayer], given: Mapping[str, Tensor]) -> None:
    """Four bits less a zero point need more: nobody should wonder where the memory went."""
    wide = [n for n, v in given.items() if isinstance(v, PackedWeight) and v.form.bits == INT8.bits]
    zeros = any("zero" in part for layer in layers.values() for part in layer.places)
    if wide and zeros:
        log.warning(
            "%d weights are held as int8 codes, as their codes less zero points fit no int4: %s",
            len(wide), shortened(wide),
        )  # fmt: skip


def _reader(config: Mapping[str, Any], directory: Path) -> Reader:
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if not isinstance(method, str) or method not in READERS:
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config.quant_method is "
            f"{shown(repr(method))}; this opens {', '.join(READERS)}; give the checkpoint that it "
            "was made from to: fqcompile quantize CHECKPOINT OUT"
        )
    return READERS[method]


def _as_if_dense(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorPlace],
    layers: Mapping[str, PackedLayer],
) -> Source:
    """What the converters of transformers know: one weight [N, K] in place of a layer's parts."""
    parts = {place for layer in layers.values() for place in layer.places.values()}
    found = {name: place for name, place in tensors.items() if place not in parts}
    for layer in layers.values():
        place = next(iter(layer.places.values()))
        weight = TensorPlace(place.path, layer.scale_dtype, (layer.n, layer.k), 0, 0)
        found[f"{layer.name}.weight"] = weight
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    return Source(directory, own, found)


def _values(
    step: Conversion,
    work: CheckpointModel,
    weights: Mapping[str, PackedLayer],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The model's tensors that a step gives."""
    packed = [name for name in step.names if name in weights]
    if not packed:
        return step.run(work.model, partial(_read, work.source, dtype))
    if len(packed) < len(step.names):
        dense = next(name for name in step.names if name not in weights)
        raise CheckpointError(
            f"{packed[0]} is packed and {dense} is not, and both are {step.target} in the model"
        )
    return {step.target: assemble(step, work.model, weights, dtype)}


def _read(source: Source, dtype: torch.dtype, name: str) -> Tensor:
    return read_tensor(source.tensors[name]).to(dtype)


def _put_all(places: Mapping[str, Slot], given: Mapping[str, Tensor], device: torch.device) -> None:
    """Each value to its place, and to those tied to it that have none of their own."""
    tied: dict[int, list[Slot]] = {}
    for slot in places.values():
        tied.setdefault(id(slot.tensor), []).append(slot)
    for name, value in given.items():
        slot = places[name]
        if value.shape != slot.tensor.shape:
            raise CheckpointError(
                f"{name} is {list(value.shape)} in the checkpoint and {list(slot.tensor.shape)} in "
                "the model; is config.json that of another model?"
            )
        moved = value.to(device)
        if isinstance(moved, PackedWeight):
            moved.memory.root.name = name
        result = nn.Parameter(moved, requires_grad=False) if slot.kind == "parameter" else moved
        for other in tied[id(slot.tensor)]:
            if other is slot or other.name not in given:
                other.put(result)
    lost = []
    for group in tied.values():
        for slot in group:
            if any(other.name in given for other in group):
                continue
            if slot.tensor.is_meta:
                lost.append(slot.name)
            else:
                slot.put(slot.tensor.to(device))
    if lost:
        raise CheckpointError(f"no tensor of the checkpoint gives {shortened(lost)} a value")
