"""The manifest: written and read the same, and strict about all that it says."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.checkpoint.manifest import (
    Manifest,
    PartsRecord,
    ShardRecord,
    SlotRecord,
    TensorRecord,
)
from fqcompile.checkpoint.packed_record import PackedRecord
from fqcompile.errors import CheckpointError

PATH = Path("fqcompile.json")
PACKED = PackedRecord(
    codes="w.codes",
    scale="w.scale",
    dtype="BF16",
    bits=4,
    group_size=32,
    rows=6,
    k=100,
    experts=2,
    transposed=True,
    scale_method="mse",
)
MANIFEST = Manifest(
    generation="01234567",
    versions={"torch": "2.13"},
    model={"class": "Model", "config": {"sizes": [1, 2.5, None]}},
    options={"bits": 4},
    sites=({"name": "w", "expert_errors": [0.1, 0.25]},),
    shards=(ShardRecord("fqcompile-01234567-00000.safetensors", 100),),
    tensors={
        "w.codes": TensorRecord(0, "U8", (12, 50), 0, "aa"),
        "w.scale": TensorRecord(0, "BF16", (12, 4), 600, "bb"),
        "b": TensorRecord(0, "F32", (), 696, "cc"),
    },
    packed={"w": PACKED},
    slots={"w": SlotRecord("parameter", "w"), "b": SlotRecord("buffer", "b")},
    files=("config.json",),
)


def signed(content: Any, **outer: Any) -> str:
    """A manifest file with a right checksum, made without the package."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    whole = {"format": "fqcompile", "version": 1, "sha256": hashlib.sha256(text).hexdigest()}
    return json.dumps({**whole, "content": content, **outer})


def content() -> Any:
    return json.loads(MANIFEST.to_json())["content"]


def test_it_reads_what_it_wrote() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), PATH) == MANIFEST
    assert Manifest.from_json(signed(content()), PATH) == MANIFEST
    assert MANIFEST.packed["w"].shape == (2, 100, 6)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda values: (
            st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_config_and_site_survives(value: Any) -> None:
    manifest = replace(MANIFEST, model={"config": value}, sites=({"x": value},))
    assert Manifest.from_json(manifest.to_json(), PATH) == manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a manifest of fqcompile"),
        ('{"format": "other"}', "not a manifest of fqcompile"),
        (signed(content(), version=5), "format version 5"),
        (signed(content(), version="1"), "format version '1'"),
        (signed(content(), sha256="00"), "checksum differs"),
        (MANIFEST.to_json().replace('"group_size": 32', '"group_size": 64'), "checksum differs"),
        (signed(None), "content is NoneType, not dict"),
        (signed({**content(), "generation": 1}), "content.generation is int, not str"),
        (signed({**content(), "more": 1}), r"\['more'\]"),
        (signed({k: v for k, v in content().items() if k != "slots"}), r"\['slots'\]"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"fqcompile\.json.*{message}"):
        Manifest.from_json(text, PATH)


def _with(*path: str | int, to: Any) -> str:
    changed = content()
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return signed(changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_with("shards", 0, "file", to="../a"), r"'\.\./a' is not a shard of the directory"),
        (_with("shards", 0, "file", to="x" * 300), r"'x+' is not a shard of the directory"),
        (_with("generation", to="../../01"), r"the generation is '\.\./\.\./01'"),
        (_with("generation", to="0" * 300), r"the generation is '0+', not 8 hexadecimal digits"),
        (_with("shards", 0, "bytes", to=-1), "shards.0..bytes is -1"),
        (_with("shards", 0, "bytes", to=True), "is bool, not int"),
        (_with("tensors", "b", "shard", to=1), "tensor b .* in shard 1"),
        (_with("tensors", "b", "dtype", to="F31"), "tensor b of 'F31'"),
        (_with("tensors", "b", "shape", to=[1.0]), "is float, not int"),
        (_with("slots", "b", "kind", to="thing"), "b is a 'thing'"),
        (_with("slots", "b", "value", to="c"), "the value 'c' of b"),
        (_with("packed", "w", "bits", to=3), "packed weight w: 3 bits"),
        (_with("packed", "w", "group_size", to=0), "in groups of 0"),
        (_with("packed", "w", "group_size", to=64), "scales BF16"),
        (_with("packed", "w", "rows", to=3), "codes U8"),
        (_with("packed", "w", "bits", to=8), "codes U8"),
        (_with("packed", "w", "dtype", to="I8"), "dtype 'I8'"),
        (_with("packed", "w", "codes", to="x"), "are not there"),
    ],
)
def test_contradictions_are_named(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(text, PATH)


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_had_uniform_levels(version: int) -> None:
    written = content()
    for record in written["packed"].values():
        del record["levels"]
    if version == 1:
        del written["sharded"]
    found = Manifest.from_json(signed(written, version=version), PATH)
    assert found == MANIFEST and found.packed["w"].format.levels == "uniform"


IN_PARTS = replace(
    MANIFEST,
    tensors={
        **MANIFEST.tensors,
        "v.part0": TensorRecord(0, "F32", (3, 2), 700, "dd"),
        "v.part1": TensorRecord(0, "F32", (1, 2), 724, "ee"),
    },
    sharded={"v": PartsRecord((4, 2), 0, ("v.part0", "v.part1"), ((0, 1, 2, 4), (1, 2)))},
    slots={**MANIFEST.slots, "v": SlotRecord("parameter", "v")},
)


def test_values_in_parts_are_found() -> None:
    assert Manifest.from_json(IN_PARTS.to_json(), PATH) == IN_PARTS
    assert IN_PARTS.shape_of("v") == (4, 2)
    assert IN_PARTS.sharded["v"].sharding.runs == (((0, 1), (2, 4)), ((1, 2),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 2}, "along dimension 2"),
        ({"parts": ["v.part0"]}, "2 of 1 parts"),
        ({"bounds": [[0, 1, 2], [1, 2]]}, "no end"),
        ({"bounds": [[0, 1, 2, 3], [1, 2]]}, "do not cover 4"),
        ({"bounds": [[0, 1, 2, 4], [0, 2]]}, "do not cover 4"),
        ({"bounds": [[0, 1], [1, 4]]}, r"v\.part0 is \[3, 2\], expected \[1, 2\]"),
        ({"parts": ["v.part0", "u"]}, "u is not there"),
        ({"shape": [4, 3]}, r"expected \[3, 3\]"),
        ({"shape": [-4, 2]}, "negative"),
    ],
)
def test_contradictions_of_parts_are_named(change: dict[str, Any], message: str) -> None:
    changed = json.loads(IN_PARTS.to_json())["content"]
    changed["sharded"]["v"].update(change)
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(signed(changed, version=2), PATH)
