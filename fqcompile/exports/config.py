"""The `config.json` of a compressed-tensors checkpoint: groups of layers, and what stays dense."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fqcompile.checkpoint.versions import versions
from fqcompile.engines.expert_rules import EXPERTS_NEED
from fqcompile.engines.module_names import stack_of
from fqcompile.engines.quantization_config import FORMAT, METHOD
from fqcompile.engines.scheme import Scheme
from fqcompile.exports.targets import target_patterns

# The library's that reads it in transformers: of experts and of all else.
_EXPERTS_VERSION, _VERSION = ".".join(map(str, (*EXPERTS_NEED, 0))), "0.17.0"


def quantization_config(
    schemes: Mapping[str, Scheme], dense: Collection[str], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """The content of `quantization_config`.

    Args:
        schemes: of packed layers by their names in the checkpoint. dense: all other layers.
        aliases: names that transformers has for layers, where they are others.
    """
    by_scheme: dict[tuple[bool, Scheme], list[str]] = {}
    for name, scheme in schemes.items():
        # Experts first and in groups of their own: transformers takes the first group whose
        # target says "experts", for all experts.
        by_scheme.setdefault((stack_of(name) is None, scheme), []).append(name)
    groups = {}
    for i, ((_, scheme), names) in enumerate(sorted(by_scheme.items(), key=_order)):
        inside = set(names)
        others = (schemes.keys() - inside) | set(dense)
        inside |= {aliases[n] for n in inside if n in aliases}
        others |= {aliases[n] for n in others if n in aliases}
        groups[f"group_{i}"] = _group(target_patterns(inside, others), scheme)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": _EXPERTS_VERSION if any(map(stack_of, schemes)) else _VERSION,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": _ignored({*dense, *(aliases[n] for n in dense if n in aliases)}),
        "fqcompile": {"version": versions()["fqcompile"]},
    }


def _order(item: tuple[tuple[bool, Scheme], list[str]]) -> tuple[bool, int, int]:
    (linear, scheme), _ = item
    return linear, scheme.bits, scheme.group_size or 0


def _group(targets: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = {"input_activations": None, "output_activations": None}
    return {"targets": list(targets), "weights": weights, **activations, "format": FORMAT}


def _ignored(names: Collection[str]) -> list[str]:
    """Plain names; a stack of experts by one expression."""
    linears = {name for name in names if stack_of(name) is None}
    stacks = target_patterns(set(names) - linears, linears)
    return [*sorted(linears), *stacks]


def model_config(
    config: Mapping[str, Any], quantization: Mapping[str, Any], dtype: str, untied: bool
) -> dict[str, Any]:
    """`config.json`: the model's own, with the type of its weights and how they are quantised.

    `untied`: the head has values of its own, whatever the model's config says.
    """
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    result = {**config, "dtype": names[dtype], "quantization_config": quantization}
    result.pop("torch_dtype", None)
    if untied:
        result["tie_word_embeddings"] = False
        if isinstance(result.get("text_config"), Mapping):
            result["text_config"] = {**result["text_config"], "tie_word_embeddings": False}
    return result
