"""What a config stores, compares and answers; the refusal of each value is in test_options.py."""

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.config import HEAD_NAMES, FineQuantConfig, SiteOptions
from fqcompile.errors import OptionError

DEFAULTS = {
    "bits": 4,
    "levels": "normal",
    "granularity": "adaptive",
    "alpha": 0.9,
    "min_group_size": 32,
    "error_budget": None,
    "scale_method": "mse",
    "include": [],
    "exclude": [],
    "overrides": {},
    "min_elements": 16384,
    "quantize_embeddings": None,
    "on_unsupported": "keep",
    "weight_updates": "detect",
    "fuse_attention": True,
    "autotune": "off",
    "calibration": "synthetic",
    "debug_dir": None,
    "inner_backend": "inductor",
    "inductor": {},
    "mode": None,
}


@pytest.fixture(autouse=True)
def no_debug_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FQCOMPILE_DEBUG_DIR", raising=False)


def test_defaults_are_the_documented_ones() -> None:
    assert FineQuantConfig().as_dict() == DEFAULTS


@pytest.mark.parametrize("options", [[], "bits=4", 4, {"bits"}], ids=str)
def test_options_that_are_no_mapping_are_refused(options: object) -> None:
    with pytest.raises(OptionError, match=r"options is of type \w+; allowed: a dict"):
        FineQuantConfig.from_options(options)  # type: ignore[arg-type]


@pytest.mark.parametrize("patch", [{"mode": "default"}, {"inductor": {"max_autotune": True}}])
def test_settings_of_inductor_need_inductor(patch: dict[str, object]) -> None:
    (name,) = patch
    wrong = rf"option {name} is for Inductor, but inner_backend is 'eager'; drop {name} or set"
    with pytest.raises(OptionError, match=wrong):
        FineQuantConfig.from_options({"inner_backend": "eager", **patch})
    FineQuantConfig.from_options(patch)
    FineQuantConfig(inner_backend="eager", inductor={}, mode=None)


def test_mode_comes_as_argument_or_as_option_but_not_as_two() -> None:
    assert FineQuantConfig.from_options(None, "lite").mode == "lite"
    assert FineQuantConfig.from_options({"mode": "lite"}).mode == "lite"
    assert FineQuantConfig.from_options({"mode": "lite"}, "lite").mode == "lite"
    assert FineQuantConfig.from_options({"mode": None}, "lite").mode == "lite"
    with pytest.raises(OptionError, match=r"mode is 'default' as argument and 'lite' as option"):
        FineQuantConfig.from_options({"mode": "lite"}, "default")


def test_config_owns_what_it_was_given() -> None:
    include, overrides, inductor = ["a"], {"a": {"bits": 8}}, {"max_autotune": True}
    config = FineQuantConfig(include=include, overrides=overrides, inductor=inductor)
    include.append("b")
    overrides["a"]["bits"] = 4
    overrides["b"] = {}
    inductor.clear()
    assert config.include == ("a",)
    assert config.overrides == {"a": {"bits": 8}}
    assert config.inductor == {"max_autotune": True}


def test_config_is_a_key_even_with_values_that_are_not() -> None:
    patch = {"trace.enabled": [1], "max_autotune": True}
    first, second = FineQuantConfig(inductor=patch), FineQuantConfig(inductor=dict(patch))
    assert first == second and hash(first) == hash(second)
    assert first != FineQuantConfig() and first in {second}
    assert dict(first.inductor) == patch


def test_order_of_overrides_counts() -> None:
    rules = {"a": {"bits": 8}, "b": {"bits": 4}}
    backwards = dict(reversed(rules.items()))
    assert FineQuantConfig(overrides=rules) != FineQuantConfig(overrides=backwards)


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, dataclasses.replace, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_copies_are_equal(twin: object) -> None:
    config = FineQuantConfig(overrides={"a": {"bits": 8}}, inductor={"max_autotune": True})
    assert callable(twin) and twin(config) == config


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FineQuantConfig().bits = 8  # type: ignore[misc]


def test_debug_dir_falls_back_to_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FQCOMPILE_DEBUG_DIR", str(tmp_path / "new"))
    assert FineQuantConfig().debug_dir == tmp_path / "new"
    assert FineQuantConfig(debug_dir=tmp_path).debug_dir == tmp_path
    assert FineQuantConfig(debug_dir=None).debug_dir is None
    monkeypatch.setenv("FQCOMPILE_DEBUG_DIR", "")
    assert FineQuantConfig().debug_dir is None


def test_first_override_that_matches_wins() -> None:
    config = FineQuantConfig(
        granularity=64,
        overrides={r"\.mlp\.": {"bits": 8}, r"^layers\.0\.": {"granularity": "column"}},
    )
    both = config.site_options("layers.0.mlp.up.weight")
    assert (both.bits, both.granularity) == (8, 64)
    second = config.site_options("layers.0.attn.q.weight")
    assert (second.bits, second.granularity) == (4, "column")
    neither = config.site_options("layers.1.attn.q.weight")
    assert (neither.bits, neither.granularity) == (4, 64)
    assert type(neither) is SiteOptions
    assert config.override_matches("layers.0.attn") and not config.override_matches("layers.1.attn")


def test_override_without_options_still_matches() -> None:
    assert FineQuantConfig(overrides={"router": {}}).override_matches("h.router.weight")


def test_head_takes_eight_bits_unless_an_override_sets_them() -> None:
    assert FineQuantConfig(bits=4).site_options("lm_head.weight", head=True).bits == 8
    overrides = {"lm_head": {"bits": 4}, "out": {"granularity": 64}}
    config = FineQuantConfig(overrides=overrides)
    assert config.site_options("lm_head.weight", head=True).bits == 4
    out = config.site_options("out.weight", head=True)
    assert (out.bits, out.granularity) == (8, 64)


def test_include_and_exclude_keep_by_name_with_the_pattern() -> None:
    config = FineQuantConfig(include=[r"mlp", r"attn"], exclude=[r"\.0\."])
    assert config.kept_by_name("layers.1.mlp.weight") is None
    assert config.kept_by_name("layers.1.head.weight") == "name matches no include pattern"
    kept = config.kept_by_name("layers.0.mlp.weight")
    assert kept == r"name matches exclude pattern '\\.0\\.'"
    assert FineQuantConfig().kept_by_name("anything") is None


SITE_VALUES = {
    "bits": st.sampled_from([4, 8]),
    "granularity": st.sampled_from(["adaptive", "range", "column"]) | st.integers(1, 1 << 40),
    "alpha": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "min_group_size": st.integers(0, 40).map(lambda e: 1 << e),
    "error_budget": st.none() | st.floats(0, 10, exclude_min=True),
    "scale_method": st.sampled_from(["mse", "absmax"]),
}
PATTERNS = st.text(max_size=8).map(re.escape)
VALUES = SITE_VALUES | {
    "include": st.lists(PATTERNS, max_size=3),
    "exclude": st.lists(PATTERNS, max_size=3),
    "overrides": st.dictionaries(
        PATTERNS, st.fixed_dictionaries({}, optional=SITE_VALUES), max_size=3
    ),
    "min_elements": st.integers(0),
    "quantize_embeddings": st.sampled_from([None, 8]),
    "on_unsupported": st.sampled_from(["keep", "error"]),
    "weight_updates": st.sampled_from(["detect", "ignore"]),
    "fuse_attention": st.booleans(),
    "autotune": st.sampled_from(["off", "fast", "max"]),
    "debug_dir": st.sampled_from([None, "dumps", "~/dumps", "dumps/deep/er"]),
    "inductor": st.dictionaries(
        st.sampled_from(["max_autotune", "trace.enabled", "cpp.threads"]),
        st.booleans() | st.integers() | st.lists(st.text()),
    ),
    "mode": st.sampled_from([None, "default", "reduce-overhead", "max-autotune"]),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_round_trip_through_json(options: dict[str, object]) -> None:
    config = FineQuantConfig.from_options(options)
    again = FineQuantConfig.from_options(json.loads(json.dumps(config.as_dict())))
    assert again == config and hash(again) == hash(config)


def test_round_trip_with_another_inner_backend() -> None:
    config = FineQuantConfig(inner_backend="eager")
    assert FineQuantConfig.from_options(config.as_dict()) == config


def test_value_without_json_form_is_given_as_text() -> None:
    config = FineQuantConfig(inductor={"trace.enabled": {1: print}})
    text = json.dumps(config.as_dict()["inductor"])
    assert text == '{"trace.enabled": {"1": "<built-in function print>"}}'


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("lm_head.weight", True),
        ("base_model.model.lm_head.weight", True),
        ("lm_head.decoder.weight", True),
        ("gpt_neox.embed_out.weight", True),
        ("mlp.shared.up.weight", False),  # an expert that all tokens take
        ("mlp.shared.weight", False),
        ("mlp.shared_expert.gate_proj.weight", False),
        ("model.embed_tokens.weight", False),  # a linear that shares it is told by its embedding
        ("not_lm_head.weight", False),
    ],
)
def test_heads_by_name(name: str, head: bool) -> None:
    assert (HEAD_NAMES.search(name) is not None) == head
