"""The options of fqcompile as frozen, hashable dataclasses; their rules are in `options`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

from fqcompile.errors import OptionError
from fqcompile.options import RULES, FrozenMapping, check_levels, check_names

HEAD_BITS = 8
# The usual names of output heads; other heads are recognized because they share their weight with
# an embedding. Names of embeddings do not count: "shared" is T5's embedding table, and in MoE
# models the expert that every token uses.
HEADS = ("lm_head", "embed_out")
HEAD_NAMES = re.compile(rf"(^|\.)({'|'.join(HEADS)})(\.|$)")

# The usual names of routers; others are recognized by their use in graphs and modules.
ROUTERS = frozenset("gate router wg shared_expert_gate".split())
ROUTER = "router: its top-k decides which experts run; name it in overrides to quantize it"

# A component of the name that begins with the prefix a peft tuner gives its factors, or that has
# LoRA's prefix anywhere: factors are switched, scaled and overwritten through `.data` while the
# model is in use. Prefixes that are also common words are listed with the rest of the name.
ADAPTER_NAMES = re.compile(
    r"(?:(?<![^._])lora_"
    r"|(?<![^.])_?(?:adamss|beft|boft|bone|c3a|delora|fourierft|frod|glora|gralora|hada|hira|hra"
    r"|ia3|ln_tuning|lokr|oft|peanut|psoft|pvera|randlora|shira|supertuning|tinylora"
    r"|trainable_tokens|unilora|vblora|vera|waveft|xlora)_"
    r"|(?<![^.])(?:deft_[PR]|lily_(?:[AB]|router)|miss_block|osf_svd_params|_osf_[USV]_\w+"
    r"|poly_router|road_(?:theta|alpha)|shadow_(?:down|up|update_\w+|model))(?![^.]))[^.]*"
)

ADAPTER = (
    "adapter factor: it is switched, scaled and overwritten while the model is in use; name it in "
    "overrides or include to quantize it"
)

# Options that only affect compilation; `quantize_` refuses them.
OF_COMPILING = (
    "weight_updates fuse_attention autotune debug_dir inner_backend inductor mode".split()
)


def excluded_by(pattern: str) -> str:
    """Why a weight is skipped whose name matches this pattern of `exclude`."""
    return f"name matches exclude pattern {pattern!r}"


def _debug_dir_from_environment() -> str | None:
    return os.environ.get("FQCOMPILE_DEBUG_DIR") or None


def _as_json(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """The options that may differ from weight to weight: the ones `quant` needs for one weight."""

    bits: int = 4
    levels: str = "normal"
    granularity: str | int = "adaptive"
    alpha: float = 0.9
    min_group_size: int = 32
    error_budget: float | None = None
    scale_method: str = "mse"

    def __new__(cls, **options: object) -> Self:
        # Before the generated __init__, whose TypeError would not suggest a name.
        names = [f.name for f in fields(cls)]
        check_names(options, names)
        if len(options) < len(names):  # else a copy, as of dataclasses.replace, which asks for none
            check_levels(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in fields(self):
            checked = RULES[option.name](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)


@dataclass(frozen=True, kw_only=True)
class FineQuantConfig(SiteOptions):
    """Every option, by the names used in `options={}`, the decorator, `explain` and the CLI.

    docs/guide/options.md has what each means. An instance is frozen and hashable.
    Lists are stored as tuples and dicts as read-only mappings. If `debug_dir` is not given, the
    environment variable FQCOMPILE_DEBUG_DIR is read; an explicit None disables dumps.

    Raises:
        OptionError: a name is unknown, a type is wrong or a value is not allowed; the message says
            what is, and the nearest name.
    """

    include: tuple[str, ...] | list[str] = ()
    exclude: tuple[str, ...] | list[str] = ()
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    min_elements: int = 16384
    quantize_embeddings: int | None = None
    on_unsupported: str = "keep"
    weight_updates: str = "detect"
    fuse_attention: bool = True
    autotune: str = "off"
    calibration: str | None = "synthetic"
    debug_dir: str | Path | None = field(default_factory=_debug_dir_from_environment)
    inner_backend: str = "inductor"
    inductor: Mapping[str, object] = field(default_factory=FrozenMapping)
    mode: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern, own in self.overrides.items():
            check_levels({"bits": self.bits, **own}, owner=f"overrides[{pattern!r}].")
        given = [name for name in ("mode", "inductor") if getattr(self, name)]
        if given and self.inner_backend != "inductor":
            raise OptionError(
                f"option {given[0]} is for Inductor, but inner_backend is {self.inner_backend!r}; "
                f"drop {given[0]} or set inner_backend='inductor'"
            )

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None, mode: str | None = None) -> Self:
        """The config for `torch.compile(options=, mode=)`; `mode` may also be an option."""
        if not isinstance(options, Mapping | None):
            kind = type(options).__name__
            raise OptionError(f"options is of type {kind}; allowed: a dict {{option: value}}")
        named = dict(options or {})
        check_names(named, RULES)
        inner = named.get("mode")
        if None not in (mode, inner) and mode != inner:
            raise OptionError(
                f"mode is {mode!r} as argument and {inner!r} as option mode; give it once"
            )
        return cls(**{**named, "mode": mode if inner is None else inner})  # type: ignore[arg-type]

    def _override(self, name: str) -> Mapping[str, object] | None:
        matches = (o for pattern, o in self.overrides.items() if re.search(pattern, name))
        return next(matches, None)

    def override_matches(self, name: str) -> bool:
        """Whether a pattern of `overrides` matches this parameter name."""
        return self._override(name) is not None

    def site_options(self, name: str, *, head: bool = False) -> SiteOptions:
        """The options of one weight: the global ones, updated by the first override that matches.

        An output head (`head=True`) gets 8 bits unless that override sets bits.
        """
        values = {f.name: getattr(self, f.name) for f in fields(SiteOptions)}
        if head:
            values["bits"] = HEAD_BITS
        return SiteOptions(**{**values, **(self._override(name) or {})})

    def kept_by_name(self, name: str) -> str | None:
        """Why a weight of this name is skipped, or None if its name allows quantizing it.

        Adapter factors are skipped unless a pattern of `overrides` or `include` matches the part of
        the name that identifies the adapter ("lora_A", not only "q_proj").
        """
        for pattern in self.exclude:
            if re.search(pattern, name):
                return excluded_by(pattern)
        if self.include and not any(re.search(pattern, name) for pattern in self.include):
            return "name matches no include pattern"
        return ADAPTER if self._has_unnamed_adapter(name) else None

    def kept_by_size(self, elements: int) -> str | None:
        """Why a weight with this many elements is skipped, or None."""
        small = elements < self.min_elements
        return f"fewer elements than min_elements={self.min_elements}" if small else None

    def _has_unnamed_adapter(self, name: str) -> bool:
        """Whether the name contains an adapter factor that no pattern matches."""
        patterns = (*self.overrides, *self.include)
        spans = [m.span() for pattern in patterns for m in re.finditer(pattern, name)]
        return any(
            not any(start < found.end() and end > found.start() for start, end in spans)
            for found in ADAPTER_NAMES.finditer(name)
        )

    @property
    def quant_method(self) -> str:
        """What `from_pretrained` asks of a `quantization_config`, which this is not.

        Raises:
            OptionError: always; it names the classes that are.
        """
        raise OptionError(
            "quantization_config is a fqcompile.FineQuantConfig, which from_pretrained does not "
            "know; give fqcompile.integrations.transformers.FineQuantHfConfig(bits=4, ...), or "
            "for diffusers fqcompile.integrations.diffusers.FineQuantDiffusersConfig(bits=4, ...)"
        )

    def as_dict(self) -> dict[str, object]:
        """Every option as a JSON value; a value that JSON cannot represent becomes a string."""
        return {f.name: _as_json(getattr(self, f.name)) for f in fields(self)}


def packing_config(options: Mapping[str, object], *, calibrates: bool = True) -> FineQuantConfig:
    """The options of `quantize_` as a config; `calibrates`: whether `calibration` is among them.

    Raises:
        OptionError: one is unknown, its value is not allowed, or it only affects compilation.
    """
    given = [name for name in OF_COMPILING if name in options]
    if given:
        raise OptionError(
            f"option {given[0]} is one of compiling, which this function does not do: pass it to "
            "torch.compile(model, backend='finequant', options=...)"
        )
    others = OF_COMPILING if calibrates else [*OF_COMPILING, "calibration"]
    check_names(options, [name for name in RULES if name not in others])  # not all of a config
    return FineQuantConfig.from_options(options if calibrates else {**options, "calibration": None})
