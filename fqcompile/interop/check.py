"""check: find what an engine would refuse, load wrongly or run slowly, without the engine."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fqcompile.checkpoint.packed_record import METHOD
from fqcompile.checkpoint.source import export_command, read_config, read_tensors
from fqcompile.errors import CheckpointError, OptionError
from fqcompile.interop.compressed_tensors import read_layers
from fqcompile.interop.expert_rules import expert_rules
from fqcompile.interop.findings import Finding, Subject, merged
from fqcompile.interop.layer_rules import cpu_rules, layer_rules
from fqcompile.interop.layers import Layer, last
from fqcompile.interop.quantization_config import (
    ENGINES,
    FORMAT,
    QuantizationConfig,
    configured_scheme,
    parse_quantization_config,
)

DEVICES = ("cuda", "cpu")
# Model families whose `_init_weights` in transformers 5.23 (models/<family>/modeling_<family>.py)
# reads the weight of a linear by the name of the child module; from_pretrained calls it for packed
# layers too, and a packed linear has no attribute "weight". T5 and Mamba2 fail there.
_T5 = frozenset({"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"})
_MAMBA = frozenset({"out_proj"})
_INITIALIZED_BY_NAME = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "udop", "pop2piano"), _T5),
    "switch_transformers": _T5,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _MAMBA),
}


def check(
    checkpoint: str | os.PathLike[str],
    engine: str = "vllm",
    *,
    tp: int = 1,
    ep: int = 1,
    device: str = "cuda",
) -> list[Finding]:
    """Check a compressed-tensors checkpoint by an engine's rules, from its config and headers.

    Args:
        checkpoint: a local directory.
        engine: "vllm", "sglang" or "transformers".
        tp: degree of tensor parallelism.
        ep: degree of expert parallelism; experts are not split.
        device: "cuda", or "cpu" for vLLM on a CPU.

    Returns:
        One finding per layer (or fused layer, or stack of experts) and broken rule, each with its
        remedy; empty if no rule is broken.

    Raises:
        CheckpointError: it is not such a checkpoint, or is damaged; file and key are named.
        OptionError: the engine or device is unknown, or a degree is not a positive int.
    """
    directory = Path(checkpoint)
    path = directory / "config.json"
    config = read_config(directory)
    tensors = read_tensors(directory)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{path} has no quantization_config: it is not quantized")
    if quantization.get("quant_method") == METHOD:
        raise CheckpointError(
            f"{directory} has weights that fqcompile packed, as save_pretrained writes them; write "
            f"it for an engine: {export_command(directory)}"
        )
    layers = read_layers(tensors)
    return find_problems(config, layers, engine, tp=tp, ep=ep, device=device, where=str(path))


def find_problems(
    config: Mapping[str, Any],
    layers: list[Layer],
    engine: str,
    *,
    tp: int = 1,
    ep: int = 1,
    device: str = "cuda",
    where: str = "config.json",
) -> list[Finding]:
    """The same check for a config and layers that are not written to files yet."""
    if engine not in ENGINES:
        raise OptionError(f"engine is {engine!r}; allowed: {', '.join(ENGINES)}")
    if device not in DEVICES or (device == "cpu" and engine == "sglang"):
        known = DEVICES[:1] if engine == "sglang" else DEVICES
        raise OptionError(f"device is {device!r}; allowed for {engine}: {', '.join(known)}")
    for name, degree in (("tp", tp), ("ep", ep)):
        if type(degree) is not int or degree < 1:
            raise OptionError(f"{name} is {degree!r}; allowed: an int >= 1")
    parsed = parse_quantization_config(config.get("quantization_config"), where)
    subject = Subject(
        engine=engine,
        config=parsed,
        layers=[_as_configured(parsed, layer) for layer in layers],
        tied=_is_tied(config),
        tp=tp,
        ep=ep,
        device=device,
        model_type=str(config.get("model_type", "")),
    )
    return merged(
        [
            *_checkpoint_rules(subject),
            *layer_rules(subject),
            *expert_rules(subject),
            *cpu_rules(subject),
        ]
    )


def _as_configured(config: QuantizationConfig, layer: Layer) -> Layer:
    if layer.scheme is None:
        return layer
    return replace(layer, scheme=configured_scheme(config, layer) or layer.scheme)


def _is_tied(config: Mapping[str, Any]) -> bool:
    """The value of a key in the config, or in the config of its language model."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    return bool(config.get("tie_word_embeddings", inner))


def _checkpoint_rules(subject: Subject) -> Iterator[Finding]:
    """All findings that concern the whole checkpoint."""
    formats = sorted({subject.config.format, *(group.format for group in subject.config.groups)})
    names, kind = [layer.name for layer in subject.packed], subject.model_type
    yield from subject.first_broken(names or ["config.json"], [
        ("nothing-packed", "refused", not names,
         "no layer has a weight_packed", "remove quantization_config from it"),
        ("format", "refused", formats != [FORMAT],
         f"the format is {', '.join(formats)}, and packed weights load as {FORMAT}",
         f"write the one format {FORMAT} for all groups"),
    ])  # fmt: skip
    read = [name for name in names if last(name) in _INITIALIZED_BY_NAME.get(kind, ())]
    own = last(read[0]) if read else ""
    yield from subject.broken(read, [(
        "initialized-by-name", "refused", read and not subject.serves,
        f"_init_weights of {kind} reads {own}.weight, which a packed layer does not have: "
        "from_pretrained raises AttributeError",
        "leave these layers dense (exclude), or use fqcompile.load",
    )])  # fmt: skip
