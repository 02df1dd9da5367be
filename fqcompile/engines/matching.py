"""Which scheme an engine finds for a layer's name; each looks in an order of its own.

    transformers   whole names, regular expressions, then class names; in each, by the alphabet
    vLLM           names, then names of a fused layer's parts (all must match, and the first part's
                   decides), then classes
    SGLang         names, then classes, then names of a fused layer's parts

A regular expression need only match the beginning of a name.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fqcompile.engines.layers import Layer
from fqcompile.engines.patterns import matches_pattern
from fqcompile.engines.quantization_config import Group, QuantizationConfig
from fqcompile.engines.scheme import Scheme

ENGINES = ("vllm", "sglang", "transformers")


@dataclass(frozen=True)
class Match:
    """The pattern that decided, and its group; None: the layer is ignored, or nothing matches."""

    pattern: str | None = None
    group: Group | None = None
    ignored: bool = False


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
    return suffix or is_class(pattern) or matches_name(pattern, name)


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
    """What the engine finds.

    Args:
        name: of the layer as the engine has it.
        parts: the names in the checkpoint of what it fuses.
    """
    if is_ignored(config, name, engine):
        return Match(ignored=True)
    found = next(_candidates(config, name, tuple(parts), engine), None)
    return Match() if found is None else Match(*found)


def _candidates(
    config: QuantizationConfig, name: str, parts: tuple[str, ...], engine: str
) -> Iterator[tuple[str, Group]]:
    targets = config.targets
    if engine == "transformers":
        targets = sorted(targets, key=lambda item: ("re:" in item[0], item[0]))
    names = [item for item in targets if not is_class(item[0])]
    by_class = [item for item in targets if is_class(item[0])]
    yield from (item for item in names if matches_name(item[0], name))
    if engine != "vllm":
        yield from by_class
    own = [next((item for item in names if matches_name(item[0], p)), None) for p in parts]
    if own and own[0] is not None and None not in own:
        yield own[0]
    yield from by_class
