"""The file format: what we write the safetensors library reads, and the other way round."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fqcompile.checkpoint.shards import ShardWriter
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import (
    ALIGNMENT,
    DTYPES,
    encode_header,
    read_header,
    read_tensor,
)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
# Others are refused.
names = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1, max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Random bytes, as any type."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(shapes)
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.tensor([draw(st.integers(0, 255)) for _ in range(count)], dtype=torch.uint8)
    if dtype == torch.bool:
        data = data % 2
    return data.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> list[int]:
    return tensor.reshape(-1).contiguous().view(torch.uint8).tolist()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(actual[name]) == bits(tensor)


@given(st.dictionaries(names.filter(lambda n: n != "__metadata__"), tensors(), min_size=1))
def test_the_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, Tensor]
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(directory, "01234567")
    writer.add(written)
    records = writer.flush()
    (shard,) = writer.shards
    assert (directory / shard.file).stat().st_size == shard.bytes
    assert_same(load_file(directory / shard.file), written)
    places = read_header(directory / shard.file).tensors
    assert_same({name: read_tensor(place) for name, place in places.items()}, written)
    base = shard.bytes - sum(record.nbytes for record in records.values())
    assert base % ALIGNMENT == 0
    assert {name: place.start - base for name, place in places.items()} == {
        name: record.start for name, record in records.items()
    }


@given(st.dictionaries(names.filter(lambda n: n != "__metadata__"), tensors(), min_size=1))
def test_we_read_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, Tensor]
) -> None:
    path = tmp_path_factory.mktemp("library") / "a.safetensors"
    save_file(written, path, metadata={"format": "pt"})
    places = read_header(path).tensors
    assert_same({name: read_tensor(place) for name, place in places.items()}, written)


def test_large_tensors_start_aligned_whatever_stands_before_them(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "01234567")
    writer.add({"odd": torch.zeros(3), "even": torch.zeros(64), "last": torch.zeros(1)})
    starts = {name: record.start for name, record in writer.flush().items()}
    assert starts == {"even": 0, "odd": 256, "last": 268}


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    numbers = torch.arange(24.0)
    views = {
        "transposed": numbers.view(4, 6).t(),
        "rows": numbers.view(4, 6)[1:3],
        "one": numbers[3::5][:1],
        "repeated": numbers[:2, None].expand(2, 3),
        "scalar": numbers[7],
    }
    writer = ShardWriter(tmp_path, "01234567")
    writer.add(views)
    writer.flush()
    read = load_file(tmp_path / writer.shards[0].file)
    assert {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in views.items()}


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """One of: some bytes changed, some removed, some added, the end cut off."""
    changed = bytearray(data)
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del changed[at : at + rng.randint(1, 8)]
    elif kind == 2:
        changed[at:at] = rng.randbytes(rng.randint(1, 8))
    else:
        del changed[at:]
    return bytes(changed)


def test_changed_headers_are_refused_or_read_as_the_library_reads_them(tmp_path: Path) -> None:
    """A foreign file has no checksum: what is not refused must lie in the file."""
    rng = random.Random(0)
    path = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(5)}, path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(2000):
        path.write_bytes(_mutated(data[:header], rng) + data[header:])
        try:
            read = {name: read_tensor(place) for name, place in read_header(path).tensors.items()}
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        for tensor in read.values():
            assert tensor.nbytes <= path.stat().st_size
    assert 1000 < refused < 2000  # a digit or a letter of a name may well change unnoticed


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}, "dtype 'F33'"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, r"dtype \['F32'\]"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, r"shape \[-1\]"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, r"shape \[1.0\]"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes 8 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4]}, r"lies at \[4\]"),
        ({"dtype": "F32", "shape": [2**70], "data_offsets": [0, 2**72]}, "cut short"),
        ("F32", "data_offsets None"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(tmp_path: Path, entry: object, message: str) -> None:
    path = tmp_path / "a.safetensors"
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(
        CheckpointError, match=rf"{path}.* tensor w .*{message}|cut short: tensor w"
    ):
        read_header(path)


def test_a_type_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"z is of torch\.complex128"):
        ShardWriter(tmp_path, "01234567").add({"z": torch.zeros(1, dtype=torch.complex128)})


@pytest.mark.parametrize(
    ("places", "length", "error"),
    [
        ({"a": (0, 16), "b": (0, 16)}, 16, "tensor b starts at byte 192, and .* ends at 208"),
        ({"a": (0, 16), "b": (8, 24)}, 24, "tensor b starts at byte 200, and .* ends at 208"),
        ({"a": (0, 16), "b": (32, 48)}, 48, "tensor b starts at byte 224, and .* ends at 208"),
        ({"a": (16, 32)}, 32, "tensor a starts at byte 144, and .* ends at 128"),
        ({"a": (0, 16)}, 32, "has 160 bytes, and its tensors end at 144; download it again"),
        ({"b": (16, 32), "a": (0, 16)}, 32, None),
        ({"a": (0, 16), "b": (16, 16), "c": (0, 0)}, 16, None),
    ],
)
def test_tensors_lie_one_after_the_other_as_the_library_demands(
    places: dict[str, tuple[int, int]], length: int, error: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    header = encode_header({n: ("U8", (end - start,), start) for n, (start, end) in places.items()})
    path.write_bytes(header + bytes(length))
    if error is None:
        load_file(path)
        assert read_header(path).tensors.keys() == places.keys()
        return
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(CheckpointError, match=error):
        read_header(path)
