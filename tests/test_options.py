"""Every option: which values it takes, which it refuses and in which words."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.config import FineQuantConfig, SiteOptions
from fqcompile.errors import FineQuantError, OptionError
from fqcompile.options import RULES, SITE_RULES, FrozenMapping, switched_on


def test_every_option_has_a_rule_and_every_rule_an_option() -> None:
    assert [f.name for f in dataclasses.fields(FineQuantConfig)] == list(RULES)
    assert [f.name for f in dataclasses.fields(SiteOptions)] == list(SITE_RULES)


UNKNOWN = [
    ({"bit": 8}, r"unknown option bit; allowed: bits, .*, mode; did you mean 'bits'\?"),
    ({"BITS": 8}, r"unknown option BITS; .*did you mean 'bits'"),
    ({"grannularity": 64}, r"grannularity.*did you mean 'granularity'\?"),
    ({"Error-Budget": 0.1}, r"Error-Budget.*did you mean 'error_budget'\?"),
    ({"zzz": 1}, r"unknown option zzz; allowed: bits, .*, mode$"),
    (
        {"max_autotune": True},
        r"a setting of Inductor: give it as inductor=\{'max_autotune': \.\.\.\}",
    ),
    ({"triton.cudagraphs": True}, r"a setting of Inductor"),
]
SITE_REFUSALS = [
    ("bits", 5, r"is 5 \(int\); allowed: 4, 8$"),
    ("bits", True, r"is True \(bool\); allowed: 4, 8"),
    ("bits", 4.0, r"is 4\.0 \(float\); allowed: 4, 8"),
    ("bits", "4", r"is '4' \(str\); allowed: 4, 8"),
    ("bits", None, r"is None; allowed: 4, 8"),
    (
        "granularity",
        "colum",
        r"'adaptive', 'range', 'column', or .* int >= 1; did you mean 'column'\?",
    ),
    ("granularity", "128", r"did you mean the int 128\?"),
    ("granularity", "²", r"is '²' \(str\); allowed: 'adaptive', 'range', 'column'.*>= 1$"),
    ("granularity", 0, r"is 0 \(int\); allowed: .*int >= 1$"),
    ("granularity", -64, r"is -64 \(int\)"),
    ("granularity", True, r"is True \(bool\)"),
    ("granularity", 64.0, r"is 64\.0 \(float\)"),
    ("alpha", 0, r"is 0 \(int\); allowed: a number with 0 < alpha < 1"),
    ("alpha", 1.0, r"is 1\.0 \(float\)"),
    ("alpha", float("nan"), r"is nan \(float\)"),
    ("alpha", "0.9", r"is '0\.9' \(str\)"),
    ("alpha", True, r"is True \(bool\)"),
    ("min_group_size", 48, r"allowed: a power of two >= 1; nearest: 32 and 64"),
    ("min_group_size", 0, r"is 0 \(int\); allowed: a power of two >= 1$"),
    ("min_group_size", -2, r"is -2 \(int\); allowed: a power of two >= 1$"),
    ("min_group_size", True, r"is True \(bool\); allowed: a power of two >= 1$"),
    ("min_group_size", 32.0, r"is 32\.0 \(float\)"),
    ("error_budget", 0.0, r"is 0\.0 \(float\); allowed: None or a finite number > 0"),
    ("error_budget", -0.1, r"is -0\.1 \(float\)"),
    ("error_budget", float("inf"), r"is inf \(float\)"),
    ("error_budget", float("nan"), r"is nan \(float\)"),
    ("error_budget", 10**400, r"is 1000.*0000 \(int\); allowed: None or a finite"),
    ("error_budget", False, r"is False \(bool\)"),
    ("scale_method", "mes", r"allowed: 'mse', 'absmax'; did you mean 'mse'\?"),
    ("scale_method", None, r"is None; allowed: 'mse', 'absmax'"),
]
GLOBAL_REFUSALS = [
    ("include", "lm_head", r"is 'lm_head' \(str\); allowed: a list of reg.*; write \['lm_head'\]"),
    ("exclude", {"a"}, r"is \{'a'\} \(set\); allowed: a list of regular expressions"),
    ("include", [3], r"option include\[0\] is 3 \(int\); allowed: a regular expression"),
    ("exclude", ["ok", "a(b"], r"option exclude\[1\] is 'a\(b'.*: missing \), .* at position 1$"),
    ("include", ["a{99999999999999}"], r"include\[0\] .* repetition number is too large"),
    ("overrides", ["a"], r"is \['a'\] \(list\); allowed: a dict \{regular expression: \{option"),
    ("overrides", {"a(b": {}}, r"overrides \(a key\) is 'a\(b'.*missing \).*position 1$"),
    ("overrides", {7: {}}, r"overrides \(a key\) is 7 \(int\)"),
    (
        "overrides",
        {"a": 8},
        r"overrides\['a'\] is 8 \(int\); allowed: a dict of bits, levels, gran",
    ),
    ("overrides", {"a": {"bit": 8}}, r"option overrides\['a'\]\.bit; .* did you mean 'bits'\?"),
    (
        "overrides",
        {"a": {"mode": "x"}},
        r"overrides\['a'\]\.mode; .*mode holds for the whole model",
    ),
    ("overrides", {"a": {3: 8}}, r"overrides\['a'\]\.3 \(int\) has no name; names are strings"),
    ("min_elements", -1, r"is -1 \(int\); allowed: an int >= 0"),
    ("min_elements", 1.5, r"is 1\.5 \(float\)"),
    ("min_elements", True, r"is True \(bool\)"),
    ("on_unsupported", "errors", r"allowed: 'keep', 'error'; did you mean 'error'\?"),
    ("weight_updates", "detekt", r"allowed: 'detect', 'ignore'; did you mean 'detect'\?"),
    ("fuse_attention", 1, r"is 1 \(int\); allowed: True, False"),
    ("autotune", "faster", r"allowed: 'off', 'fast', 'max'; did you mean 'fast'\?"),
    ("autotune", True, r"is True \(bool\); allowed: 'off', 'fast', 'max'"),
    ("debug_dir", "", r"is '' \(str\); allowed: the path of a directory.*FQCOMPILE_DEBUG_DIR"),
    ("debug_dir", 3, r"is 3 \(int\)"),
    ("debug_dir", __file__, r"allowed: the path of a directory"),
    ("inner_backend", "finequant", r"allowed: the name of a torch\.compile backend other than"),
    ("inner_backend", "", r"is '' \(str\)"),
    ("inner_backend", print, r"\(builtin_function_or_method\)"),
    ("inductor", [("a", 1)], r"\(list\); allowed: a dict \{name of an Inductor setting: value\}"),
    ("inductor", {"max_autotun": 1}, r"inductor has the key 'max_autotun'.*mean 'max_autotune'\?"),
    ("inductor", {1: 1}, r"inductor has the key 1; allowed: the names in torch\._inductor"),
    ("mode", "max-autotun", r"allowed: None, 'default', .*; did you mean 'max-autotune'\?"),
    ("mode", "reduce_overhead", r"did you mean 'reduce-overhead'\?"),
    ("mode", 3, r"is 3 \(int\); allowed: None, 'default'"),
]


@pytest.mark.parametrize(("options", "message"), UNKNOWN, ids=str)
def test_unknown_name_is_refused_by_every_way_in(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FineQuantConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=message):
        FineQuantConfig.from_options(options)


@pytest.mark.parametrize(("name", "value", "message"), SITE_REFUSALS + GLOBAL_REFUSALS, ids=str)
def test_value_is_refused_with_option_value_and_rule(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        FineQuantConfig.from_options({name: value})
    assert f"option {name}" in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), SITE_REFUSALS, ids=str)
def test_override_is_held_to_the_same_rules(name: str, value: object, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        FineQuantConfig(overrides={"lm_head$": {name: value}})
    assert f"option overrides['lm_head$'].{name} is" in str(caught.value)


def test_option_error_is_a_value_error_of_ours() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, FineQuantError)


def test_option_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(OptionError, match=r"option 4 \(int\) has no name; names are strings"):
        FineQuantConfig.from_options({4: "bits"})  # type: ignore[dict-item]


def test_debug_dir_knows_the_home_directory() -> None:
    assert FineQuantConfig(debug_dir="~/fq").debug_dir == Path(os.path.expanduser("~/fq"))


def test_frozen_mapping_compares_with_mappings_alone() -> None:
    assert FrozenMapping({"a": 1}) == {"a": 1}
    assert FrozenMapping({"a": 1}) != {"a": 2}
    assert FrozenMapping() != 3
    assert repr(FrozenMapping({"a": 1})) == "{'a': 1}"


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()


@given(
    st.sampled_from(sorted(RULES)),
    ANYTHING | st.lists(ANYTHING) | st.dictionaries(st.text(), ANYTHING),
)
def test_any_value_is_taken_or_refused_by_name(name: str, value: object) -> None:
    try:
        FineQuantConfig.from_options({name: value})
    except OptionError as error:
        assert f"option {name}" in str(error)


@pytest.mark.parametrize("usual", [True, False])
def test_what_switches_by_the_environment_is_on_or_off_in_any_of_the_usual_words(
    usual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FQCOMPILE_X", raising=False)
    assert switched_on("FQCOMPILE_X", usual) is usual
    said = {True: ("1", "true", "on", "yes", "TRUE", " On "), False: ("0", "false", "off", "No")}
    for on, words in {**said, usual: (*said[usual], "", " ")}.items():
        for word in words:
            monkeypatch.setenv("FQCOMPILE_X", word)
            assert switched_on("FQCOMPILE_X", usual) is on, word
    for word in ("2", "-", "none", "disable"):
        monkeypatch.setenv("FQCOMPILE_X", word)
        with pytest.raises(OptionError) as caught:
            switched_on("FQCOMPILE_X", usual)
        assert str(caught.value) == (
            f"environment variable FQCOMPILE_X is {word!r}; "
            "allowed: 1, true, on, yes and 0, false, off, no"
        )


def test_the_reference_names_every_environment_variable() -> None:
    root = Path(__file__).parents[1]
    sources = [path.read_text() for path in (root / "fqcompile").rglob("*.py")]
    read = {name for text in sources for name in re.findall(r'"(FQCOMPILE_[A-Z_]+)"', text)}
    reference = (root / "docs" / "reference.md").read_text()
    assert set(re.findall(r"^\| `(FQCOMPILE_[A-Z_]+)`", reference, re.MULTILINE)) == read
