"""Strict reader of a compressed-tensors `quantization_config`, and the lookup of layers in it.

{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
 "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, ...}}}}

Each engine looks for a layer's name in an order of its own:

    transformers   whole names, regular expressions, then class names; in each, by the alphabet
    vLLM           names, then names of a fused layer's parts (all must match, and the first part's
                   decides), then classes
    SGLang         names, then classes, then names of a fused layer's parts

In `ignore` only transformers knows class names. vLLM and SGLang ignore a fused layer if all of its
parts are; or for its own name, which SGLang compares as a whole and vLLM as any other.
A regular expression need only match the beginning of a name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fqcompile.errors import CheckpointError
from fqcompile.files.untrusted import check_name, check_pattern, matches_pattern, shown
from fqcompile.interop.layers import Layer, Scheme, is_head

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
# The library refuses all others.
_WEIGHT_KEYS = frozenset(
    """num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype
    zp_dtype observer observer_kwargs""".split()
)
_GROUP_KEYS = frozenset("targets weights input_activations output_activations format".split())


@dataclass(frozen=True)
class Group:
    """A scheme, and the patterns of layer names that use it."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    format: str


@dataclass(frozen=True)
class QuantizationConfig:
    """The groups in their order, and the patterns of names that stay dense."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    format: str

    @property
    def targets(self) -> list[tuple[str, Group]]:
        return [(target, group) for group in self.groups for target in group.targets]


def parse_quantization_config(content: Any, where: str) -> QuantizationConfig:
    """The config from JSON.

    Args:
        where: the file, for errors.

    Raises:
        CheckpointError: a key is missing, unknown where the library forbids that, or has a value
            that is no weight-only int4 or int8; file and key are named.
    """
    where = f"{where}: quantization_config"
    found = _mapping(content, where)
    if found.get("quant_method") != METHOD:
        _refuse(f"{where}.quant_method", found.get("quant_method"), f"{METHOD!r}")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if found.get(key):
            _refuse(f"{where}.{key}", found[key], "none: only weights may be quantized")
    default = found.get("format")
    if not isinstance(default, str):
        _refuse(f"{where}.format", default, f"{FORMAT!r}")
    groups = _mapping(found.get("config_groups"), f"{where}.config_groups")
    if not groups:
        _refuse(f"{where}.config_groups", groups, "at least one group")
    for key in (default, *groups):
        check_name(key, f"{where}.config_groups")
    parsed = [_group(k, v, default, f"{where}.config_groups.{k}") for k, v in groups.items()]
    ignore = found.get("ignore")
    patterns = _patterns([] if ignore is None else ignore, f"{where}.ignore")
    return QuantizationConfig(tuple(parsed), patterns, default)


def _group(name: str, content: Any, default: str, where: str) -> Group:
    found = _mapping(content, where)
    _known(found, _GROUP_KEYS, where)
    for key in ("input_activations", "output_activations"):
        if found.get(key) is not None:
            _refuse(f"{where}.{key}", found[key], "null: only weights may be quantized")
    own = found.get("format")
    if own is not None and not isinstance(own, str):
        _refuse(f"{where}.format", own, f"{FORMAT!r}")
    check_name(own or default, f"{where}.format")
    targets = _patterns(found.get("targets"), f"{where}.targets")
    scheme = _scheme(found.get("weights"), f"{where}.weights")
    return Group(name, targets, scheme, own or default)


def _scheme(content: Any, where: str) -> Scheme:
    found = _mapping(content, where)
    _known(found, _WEIGHT_KEYS, where)
    bits = found.get("num_bits", 8)
    if type(bits) is not int or not 1 <= bits <= 8:
        _refuse(f"{where}.num_bits", bits, "1 to 8")
    if found.get("type", "int") != "int":
        _refuse(f"{where}.type", found["type"], "'int'")
    if found.get("dynamic"):
        _refuse(f"{where}.dynamic", found["dynamic"], "false")
    if found.get("actorder") not in (None, False, "weight", "static"):
        _refuse(f"{where}.actorder", found["actorder"], "null or 'weight': columns stay in order")
    symmetric = found.get("symmetric", True)
    if type(symmetric) is not bool:
        _refuse(f"{where}.symmetric", symmetric, "true or false")
    return Scheme(bits, _group_size(found, where), symmetric)


def _group_size(found: Mapping[str, Any], where: str) -> int | None:
    size, strategy = found.get("group_size"), found.get("strategy")
    if size is not None and type(size) is not int:
        _refuse(f"{where}.group_size", size, "an int or null")
    if strategy is None and size is not None:
        strategy = "channel" if size == -1 else "group"
    if strategy == "channel" and (size is None or size == -1):
        return None
    if strategy == "group" and size is not None and size > 0:
        return size
    if strategy not in ("group", "channel"):
        _refuse(f"{where}.strategy", strategy, "'group' or 'channel'")
    return _refuse(f"{where}.group_size", size, f"what strategy {strategy!r} needs")


def _patterns(content: Any, where: str) -> tuple[str, ...]:
    if not isinstance(content, Sequence) or isinstance(content, str):
        _refuse(where, content, "a list of names")
    for i, pattern in enumerate(content):
        if not isinstance(pattern, str):
            _refuse(f"{where}[{i}]", pattern, "a name")
        if pattern.startswith("re:"):
            check_pattern(pattern.removeprefix("re:"), f"{where}[{i}]")
        else:
            check_name(pattern, f"{where}[{i}]")
    return tuple(content)


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        _refuse(where, content, "a JSON object")
    return content


def _known(found: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in found:
        if key not in known:
            raise CheckpointError(f"{where}.{shown(key)} is not a key of compressed-tensors")


def _refuse(where: str, value: object, allowed: str) -> NoReturn:
    raise CheckpointError(f"{where} is {shown(repr(value))}; it must be {allowed}")


ENGINES = ("vllm", "sglang", "transformers")


@dataclass(frozen=True)
class Match:
    """The pattern that decided, and its group; None: the layer is ignored, or nothing matches."""

    pattern: str | None = None
    group: Group | None = None
    ignored: bool = False

    @property
    def scheme(self) -> Scheme | None:
        return None if self.group is None else self.group.scheme


def matches_name(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return matches_pattern(pattern.removeprefix("re:"), name)
    return pattern == name


def is_class(pattern: str) -> bool:
    """Whether a pattern names what every linear layer is."""
    return pattern in ("Linear", "LinearBase", "QKVParallelLinear", "MergedColumnParallelLinear")


def is_ignored(config: QuantizationConfig, name: str, engine: str) -> bool:
    return any(_ignores(pattern, name, engine) for pattern in config.ignore)


def _ignores(pattern: str, name: str, engine: str) -> bool:
    suffix = engine == "sglang" and not pattern.startswith("re:") and name.endswith(f".{pattern}")
    by_class = engine == "transformers" and is_class(pattern)
    return suffix or by_class or matches_name(pattern, name)


def configured_scheme(config: QuantizationConfig, layer: Layer) -> Scheme | None:
    """The config's scheme that a packed layer's tensors bear out; None: there is none.

    Tensors alone leave the group size open where it does not divide K: three groups of K = 160 are
    groups of 54 to 79. Where several schemes of the config fit, the targets decide.
    """
    stored = layer.scheme
    assert stored is not None
    fits = {
        scheme
        for scheme in (group.scheme for group in config.groups)
        if (scheme.bits, scheme.symmetric) == (stored.bits, stored.symmetric)
        and scheme.groups(layer.k) == stored.groups(layer.k)
    }
    if len(fits) > 1:
        group = find_match(config, layer.name, (), "transformers").group
        fits &= set() if group is None else {group.scheme}
    return fits.pop() if fits else None


def find_match(config: QuantizationConfig, name: str, parts: Iterable[str], engine: str) -> Match:
    """The match that the engine finds.

    Args:
        name: of the layer as the engine has it.
        parts: the names in the checkpoint of what it fuses.
    """
    parts = tuple(parts)
    whole_name_alone = engine == "sglang" and parts
    if name in config.ignore if whole_name_alone else is_ignored(config, name, engine):
        return Match(ignored=True)
    found = next(_candidates(config, name, parts, engine), None)
    return Match() if found is None else Match(*found)


def _candidates(
    config: QuantizationConfig, name: str, parts: tuple[str, ...], engine: str
) -> Iterator[tuple[str, Group]]:
    targets = config.targets
    if engine == "transformers":
        targets = sorted(targets, key=lambda item: ("re:" in item[0], item[0]))
    names = [item for item in targets if not is_class(item[0])]
    by_class = [item for item in targets if is_class(item[0])]
    if engine != "transformers" and is_head(name):  # its class there is ParallelLMHead
        by_class = [item for item in by_class if item[0] != "Linear"]
    yield from (item for item in names if matches_name(item[0], name))
    if engine != "vllm":
        yield from by_class
    own = [next((item for item in names if matches_name(item[0], p)), None) for p in parts]
    if own and own[0] is not None and None not in own:
        yield own[0]
    yield from by_class
