"""What a shard says of itself: read as it was written, and strict about what others wrote."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fqcompile
from fqcompile.checkpoint.packed_record import METHOD, described, read_packed
from fqcompile.errors import CheckpointError
from fqcompile.weights.parameter import PackedWeight
from tests.checkpoint.small_models import small


def test_a_shard_describes_its_weights_to_the_library_too(tmp_path: Path) -> None:
    model = small()
    fqcompile.save(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[METHOD])
    tensors, records = read_packed([path])
    assert said["version"] == 1 and said["weights"].keys() == records.keys() != set()
    for name, record in records.items():
        weight = model.get_parameter(name)
        assert isinstance(weight, PackedWeight)
        assert record.format == weight.quantized().format and record.shape == weight.shape
        assert torch.equal(load_file(path)[record.codes], weight.quantized().qweight)
        assert tensors[record.codes].shape == tuple(weight.quantized().qweight.shape)


def test_shards_of_earlier_versions_do_not(tmp_path: Path) -> None:
    """And are read, with the header that they had."""
    model = small()
    fqcompile.save(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    _earlier(tmp_path, path)
    loaded = fqcompile.load(lambda: small(1), tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(weight.detach() + 0, loaded.get_parameter(name).detach() + 0)
    with pytest.raises(CheckpointError, match="no metadata says by a key finequant how"):
        read_packed([path])


def _earlier(directory: Path, path: Path) -> None:
    """As version 3 wrote it; made without the package."""
    outer = json.loads((directory / "fqcompile.json").read_text())
    content, raw = outer["content"], path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    content["shards"][0] = {"file": path.name, "bytes": path.stat().st_size}
    (directory / "fqcompile.json").write_text(_signed(content, 3))


def _signed(content: Any, version: int) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest()
    outer = {"format": "fqcompile", "version": version, "sha256": digest, "content": content}
    return json.dumps(outer)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    fqcompile.save(small(), tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[METHOD])
    copied = tmp_path / "copied.safetensors"
    save_file(load_file(path), copied)
    return copied, said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, and this fqcompile reads 1"),
        ({"version": "1"}, "has version '1'"),
        ({"weights": []}, "weights is list, not dict"),
        ({"weights": {"a": {}}}, "lacks or has too many"),
        ({"more": 1}, r"\['more'\]"),
        ("", "is not JSON"),
        ("[]", "has version None"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(
    written: tuple[Path, dict[str, Any]], change: Any, message: str
) -> None:
    path, said = written
    text = change if isinstance(change, str) else json.dumps(said | change)
    save_file(load_file(path), path, metadata={METHOD: text})
    with pytest.raises(CheckpointError, match=message):
        read_packed([path])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 3, "3 bits"),
        ("group_size", 0, "in groups of 0"),
        ("rows", 1 << 40, "codes U8"),
        ("k", 5, "of 5"),
        ("experts", 7, "codes U8"),
        ("codes", "nothing", "not there"),
        ("scale", "up.bias", "scales F32"),
        ("dtype", "I8", "dtype 'I8'"),
        ("levels", "odd", "odd levels"),
        ("transposed", 1, "is int, not bool"),
    ],
)
def test_contradictions_are_named(
    written: tuple[Path, dict[str, Any]], key: str, value: Any, message: str
) -> None:
    path, said = written
    said["weights"]["up.weight"][key] = value
    save_file(load_file(path), path, metadata={METHOD: json.dumps(said)})
    with pytest.raises(CheckpointError, match=message):
        read_packed([path])


@pytest.mark.parametrize(
    ("part", "dtype", "message"),
    [("codes", torch.int8, "codes I8"), ("scale", torch.int32, "scales I32")],
)
def test_tensors_of_another_type_are_named(
    written: tuple[Path, dict[str, Any]], part: str, dtype: torch.dtype, message: str
) -> None:
    path, said = written
    tensors = load_file(path)
    name = said["weights"]["up.weight"][part]
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path, metadata={METHOD: json.dumps(said)})
    with pytest.raises(CheckpointError, match=message):
        read_packed([path])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("more", "packed weight more: its codes or scales are those of up.weight"),
        ("up.bias", r"packed weight up.bias: its codes or scales are those of up.weight"),
        ("a" * 600, "has the name 'aaa"),
        ("up\x1b[2J", r"has the name 'up\\x1b\[2J'"),
        ("", "has the name ''"),
    ],
)
def test_two_weights_do_not_share_tensors(
    written: tuple[Path, dict[str, Any]], name: str, message: str
) -> None:
    path, said = written
    said["weights"][name] = said["weights"]["up.weight"]
    save_file(load_file(path), path, metadata={METHOD: json.dumps(said)})
    with pytest.raises(CheckpointError, match=message):
        read_packed([path])
    del said["weights"]["up.weight"]
    save_file(load_file(path), path, metadata={METHOD: json.dumps(said)})
    if name == "more":  # of a name that the tensors do not have: only the model tells
        assert "more" in read_packed([path])[1]
        return
    with pytest.raises(CheckpointError, match=r"a dense tensor has its name|has the name"):
        read_packed([path])


def test_files_that_contradict_each_other_are_refused(
    written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, said = written
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other, metadata={METHOD: json.dumps(said)})
    save_file(load_file(path), path, metadata={METHOD: json.dumps(said)})
    assert read_packed([path, other])[1].keys() == said["weights"].keys()
    said["weights"]["up.weight"]["scale_method"] = "of another time"
    save_file({"x": torch.zeros(1)}, other, metadata={METHOD: json.dumps(said)})
    with pytest.raises(CheckpointError, match=r"up\.weight: another file describes it otherwise"):
        read_packed([path, other])


def test_codes_and_scales_may_lie_in_two_files(
    written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """As `save_pretrained` cuts its shards, whose headers then all say the same."""
    path, said = written
    tensors = load_file(path)
    halves = [
        {n: t for n, t in tensors.items() if n.endswith("codes") == codes} for codes in (0, 1)
    ]
    paths = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for half, file in zip(halves, paths, strict=True):
        save_file(half, file, metadata={METHOD: json.dumps(said)})
    assert read_packed(paths)[1].keys() == said["weights"].keys()
    with pytest.raises(CheckpointError, match="codes or scales are not there"):
        read_packed(paths[:1])


def test_a_file_may_have_no_packed_weight(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata=described({}))
    assert read_packed([tmp_path / "a.safetensors"])[1] == {}
