"""The `config.json` of a compressed-tensors checkpoint: groups of layers, and what stays dense.

Names of layers become few regular expressions that match just them, under every engine's names:

    model.layers.{0,2}.self_attn.{q,k,v}_proj
        -> re:(?:.*\\.)?layers\\.(?:0|2)\\.self_attn\\.(?:k_proj|q_proj|qkv_proj|v_proj)$

Engines put prefixes before names and fuse layers, so an expression begins where the first list of
modules does, and has the fused name too.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fqcompile.checkpoint.manifest import versions
from fqcompile.interop.expert_rules import EXPERTS_NEED
from fqcompile.interop.layers import Scheme, fused_name, stack_of
from fqcompile.interop.quantization_config import FORMAT, METHOD

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
    # Most of SGLang's classes do not tell what they fuse: it looks for `qkv_proj` in ignore.
    present = schemes.keys() | set(dense)
    fused = {fused_name(name, present) for name in dense if stack_of(name) is None}
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
        "ignore": _ignored({*dense, *fused, *(aliases[n] for n in dense if n in aliases)}),
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
    """`config.json`: the model's own, with the type of its weights and how they are quantized.

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


_NUMBER = re.compile(r"\d+")
_ANY_PREFIX = r"(?:.*\.)?"


@dataclass(frozen=True, order=True)
class _Place:
    """A name cut into the list it is in, its number there, the module below, and its own name."""

    before: str
    number: str
    below: str
    own: str


def target_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions, `re:` before each, for `names`.

    Args:
        names: layers of one scheme. others: all further layers, which nothing may match.
    """
    wanted, rest = set(names), set(others)
    present = wanted | rest
    for whole_prefix in (False, True):
        patterns = _patterns(wanted, present, whole_prefix)
        compiled = [re.compile(p.removeprefix("re:")) for p in patterns]
        if not any(c.match(name) for c in compiled for name in rest):
            return patterns
    return sorted({_whole_name(name) for name in wanted})


def _patterns(wanted: set[str], present: set[str], whole_prefix: bool) -> list[str]:
    siblings: dict[tuple[str, str], dict[str, set[str]]] = {}
    for name in wanted:
        place = _place(name, whole_prefix)
        key = (place.before, place.below)
        owns = siblings.setdefault(key, {}).setdefault(place.number, set())
        owns |= {place.own, *_fused_own(name, present)}
    rows: dict[tuple[str, str, frozenset[str]], list[str]] = {}
    for (before, below), numbers in siblings.items():
        for number, owns in numbers.items():
            rows.setdefault((before, below, frozenset(owns)), []).append(number)
    return sorted(
        "re:" + _expression(before, numbers, below, owns)
        for (before, below, owns), numbers in rows.items()
    )


def _expression(before: str, numbers: list[str], below: str, owns: frozenset[str]) -> str:
    parts = [re.escape(before)] if before else []
    if any(numbers):
        parts.append(_either(sorted(numbers, key=int)))
    parts += [re.escape(below)] if below else []
    experts = owns == frozenset({""})
    parts += [] if experts else [_either(sorted(map(re.escape, owns)))]
    return _ANY_PREFIX + r"\.".join(parts) + (r"(?:\..*)?$" if experts else "$")


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def _place(name: str, whole_prefix: bool) -> _Place:
    """Experts count as one layer, without a name of its own."""
    stack = stack_of(name)
    parent, _, own = (name, "", "") if stack is None else (stack, "", "")
    if stack is None:
        parent, _, own = name.rpartition(".")
    path = parent.split(".") if parent else []
    index = next((i for i, part in enumerate(path) if _NUMBER.fullmatch(part)), None)
    if index is None:
        return _Place("", "", parent, own)
    start = 0 if whole_prefix else max(0, index - 1)
    return _Place(".".join(path[start:index]), path[index], ".".join(path[index + 1 :]), own)


def _fused_own(name: str, present: set[str]) -> set[str]:
    if stack_of(name) is not None:
        return set()
    fused = fused_name(name, present)
    return {fused.rpartition(".")[2]} if fused != name else set()


def _whole_name(name: str) -> str:
    stack = stack_of(name)
    return f"re:{re.escape(name)}$" if stack is None else rf"re:{re.escape(stack)}(?:\..*)?$"
