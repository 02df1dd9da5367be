"""Files of the weight cache: bit for bit what was written, or refused."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fqcompile.errors import CorruptEntry
from fqcompile.quant.choose import QuantPlan
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.disk_cache import Entry, encoded, read_entry
from tests.strategies import random_codes

KEY = "0123abcd"


def entry(
    bits: int = 4, rows: int = 6, k: int = 33, group_size: int = 16, experts: int = 0, seed: int = 0
) -> Entry:
    """Any codes and scales, of `rows` for each expert: nothing is quantized here."""
    generator = torch.Generator().manual_seed(seed)
    every = rows * max(1, experts)
    codes = random_codes(bits, every, k, generator)
    scale = torch.randn(every, -(-k // group_size), generator=generator).bfloat16()
    errors = tuple(0.1 + i / 3 for i in range(experts))
    plan = QuantPlan(bits, group_size, "mse", torch.bfloat16, 1 / 3, errors)
    return plan, QuantizedTensor.of_rows(codes, scale, Format(bits, group_size, rows, k, experts))


def write_entry(path: Path, key: str, written: Entry) -> None:
    path.write_bytes(b"".join(encoded(key, written)))


def assert_same(read: Entry, written: Entry) -> None:
    (plan, weight), (expected_plan, expected) = read, written
    assert plan == expected_plan
    assert (weight.bits, weight.group_size, weight.shape) == (
        expected.bits,
        expected.group_size,
        expected.shape,
    )
    for name in ("qweight", "scale"):
        found, wanted = getattr(weight, name), getattr(expected, name)
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        # As bytes: a scale that is NaN is none the less the same.
        assert found.view(torch.uint8).equal(wanted.contiguous().view(torch.uint8))


@given(
    st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70),
    st.integers(0, 3), st.integers(0, 999),
)  # fmt: skip
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int, rows: int, k: int, group_size: int, experts: int, seed: int,
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "entry.safetensors"
    written = entry(bits, rows, k, group_size, experts, seed)
    write_entry(path, KEY, written)
    assert_same(read_entry(path, KEY), written)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_scales_keep_their_type(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    plan, weight = entry()
    scale = weight.scale.to(scale_dtype)
    plan = QuantPlan(4, 16, "absmax", scale_dtype, float("inf"))
    written = plan, QuantizedTensor(weight.qweight, scale, Format(4, 16, *weight.shape))
    write_entry(tmp_path / "e", KEY, written)
    assert_same(read_entry(tmp_path / "e", KEY), written)


def test_the_file_is_safetensors_and_says_how_the_weight_was_quantized(tmp_path: Path) -> None:
    plan, weight = entry(experts=2)
    write_entry(tmp_path / "e", KEY, (plan, weight))
    with safe_open(tmp_path / "e", framework="pt") as file:
        assert set(file.keys()) == {"qweight", "scale"}
        assert file.get_tensor("qweight").equal(weight.as_rows()[0])
        assert file.get_tensor("scale").equal(weight.as_rows()[1])
        about = json.loads(file.metadata()["plan"])
    assert (about["bits"], about["k"], about["scale_dtype"]) == (4, 33, "bfloat16")
    assert about["expert_errors"] == list(plan.expert_errors)


@pytest.mark.parametrize("experts", range(5))
def test_values_lie_on_multiples_of_their_size(experts: int) -> None:
    """As safetensors itself writes them, so that others may map the file."""
    plan, weight = entry(rows=3, k=9, experts=experts)  # an odd number of bytes of codes
    content = b"".join(encoded(KEY, (plan, weight)))
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    scale = start + json.loads(content[8:start])["scale"]["data_offsets"][0]
    assert scale % weight.scale.itemsize == 0
    wanted = weight.scale.view(torch.uint8).numpy().tobytes()
    assert content[scale : scale + len(wanted)] == wanted


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    plan, weight = entry(rows=12)
    part = weight.narrow(4, 5)
    strided = QuantizedTensor(
        part.qweight.t().contiguous().t(), part.scale, Format(4, part.group_size, *part.shape)
    )
    write_entry(tmp_path / "e", KEY, (plan, strided))
    assert_same(read_entry(tmp_path / "e", KEY), (plan, part))


def test_a_file_of_another_key_is_refused(tmp_path: Path) -> None:
    write_entry(tmp_path / "e", KEY, entry())
    with pytest.raises(CorruptEntry, match="its digest is that of other content"):
        read_entry(tmp_path / "e", KEY + "0")


def test_a_missing_file_is_no_corrupt_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_entry(tmp_path / "e", KEY)


def test_the_caller_s_device_is_not_that_of_files(tmp_path: Path) -> None:
    written = entry()
    with torch.device("meta"):
        write_entry(tmp_path / "e", KEY, written)
        found = read_entry(tmp_path / "e", KEY)
    assert_same(found, written)


def test_the_header_of_very_many_experts_is_read(tmp_path: Path) -> None:
    written = entry(experts=2000)
    write_entry(tmp_path / "e", KEY, written)
    assert_same(read_entry(tmp_path / "e", KEY), written)


def mutations(good: bytes) -> Iterator[bytes]:
    """Every byte changed in three ways, every length cut to, and 1,000 larger accidents."""
    for at in range(len(good)):
        for mask in (0x01, 0x80, 0xFF):
            yield good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :]
        yield good[:at]
    draw = random.Random(0)
    for _ in range(250):
        a, b = sorted(draw.sample(range(len(good) + 1), 2))
        yield good[:a] + good[b:]  # a piece is lost
        yield good[:a] + draw.randbytes(b - a) + good[b:]
        yield good[:a] + draw.randbytes(draw.randint(1, 64)) + good[a:]
        yield good[:a] + bytes(b - a) + good[b:]  # a page that never reached the disk
    yield from (good + b"\0", bytes(len(good)), b"\xff" * len(good), b"")


def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    path, written = tmp_path / "e", entry(rows=4, k=18)
    write_entry(path, KEY, written)
    refused = tried = 0
    for bad in mutations(path.read_bytes()):
        tried += 1
        path.write_bytes(bad)
        try:
            found = read_entry(path, KEY)
        except CorruptEntry as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert_same(found, written)
    assert tried > 2500
    assert refused > 0.9 * tried  # what is left changed blanks, or bytes behind the last tensor


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 5000,
        b"{}",
        b"[]",
        b'{"__metadata__": 3, "qweight": {}, "scale": {}}',
        b'{"__metadata__": {}, "qweight": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}',
        b'{"qweight": {"dtype": "U8", "shape": [99999999999999, 9999], "data_offsets": [0, 1]}}',
        b'{"qweight": {"dtype": "U8", "shape": [2, 2], "data_offsets": [-99, 1]}}',
        b'{"qweight": {"dtype": "U8", "shape": [2, 2], "data_offsets": "ab"}}',
        b'{"qweight": {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 32]}}',
        b"\xff\xfe",
    ],
)
def test_a_header_of_anything_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with pytest.raises(CorruptEntry):
        read_entry(path, KEY)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes((2**62).to_bytes(8, "little"))
    with pytest.raises(CorruptEntry, match=f"a header of {2**62}"):
        read_entry(path, KEY)
