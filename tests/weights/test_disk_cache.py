"""DiskCache: what is found, what goes first, and what happens where nothing can be kept."""

import logging
import os
import random
import re
from pathlib import Path

import pytest

from fqcompile.errors import UnquantizableWeight
from fqcompile.weights.disk_cache import DiskCache, Entry, Usage, encoded
from tests.weights.test_disk_cache_entries import assert_same, entry

SIZE = sum(map(len, encoded("a", entry())))


def unwanted() -> Entry:
    raise AssertionError("this was on disk")


def put(cache: DiskCache, *keys: str) -> None:
    for key in keys:
        cache.get_or_make(key, lambda key=key: entry(seed=ord(key[-1])))


def kept(directory: Path) -> set[str]:
    return {path.stem for path in directory.glob("*.safetensors")}


def grown_old(directory: Path, *keys: str) -> None:
    """As if used long ago, in this order."""
    for age, key in enumerate(reversed(keys)):
        os.utime(directory / f"{key}.safetensors", (1e9 - age, 1e9 - age))


def test_what_one_process_keeps_another_finds(tmp_path: Path) -> None:
    first, second = DiskCache(tmp_path / "new", 2**30), DiskCache(tmp_path / "new", 2**30)
    made = first.get_or_make("a", entry)
    assert_same(second.get_or_make("a", unwanted), made)
    assert_same(first.get_or_make("a", unwanted), made)
    assert (first.hits, first.misses, second.hits, second.misses) == (1, 1, 1, 0)
    assert second.get_or_make("b", lambda: entry(seed=1))[1].qweight.equal(entry(seed=1)[1].qweight)
    assert first.usage().entries == 2
    assert first.usage().nbytes == sum(p.stat().st_size for p in first.directory.iterdir())


def test_nothing_is_kept_of_a_weight_that_cannot_be_quantized(tmp_path: Path) -> None:
    def refuse() -> Entry:
        raise UnquantizableWeight("no")

    cache = DiskCache(tmp_path, 2**30)
    with pytest.raises(UnquantizableWeight):
        cache.get_or_make("a", refuse)
    assert cache.usage() == Usage(0, 0)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    put(DiskCache(tmp_path, 2**30), "a", "b", "c", "d")
    grown_old(tmp_path, "c", "a", "d", "b")
    DiskCache(tmp_path, 4 * SIZE).get_or_make("c", unwanted)  # another process uses the oldest
    cache = DiskCache(tmp_path, 4 * SIZE)
    put(cache, "e")
    assert kept(tmp_path) == {"c", "d", "b", "e"}
    put(cache, "f")
    assert kept(tmp_path) == {"c", "b", "e", "f"}


def test_the_bound_holds_after_each_entry(tmp_path: Path) -> None:
    limit = 200_000
    draw = random.Random(0)
    for number in range(60):
        cache = DiskCache(tmp_path, limit)
        rows = draw.randint(1, 3000)
        cache.get_or_make(f"{number}", lambda rows=rows: entry(rows=rows))
        assert cache.usage().nbytes <= limit
        assert f"{number}" in kept(tmp_path)
    assert len(kept(tmp_path)) >= 3


def test_a_model_beyond_the_bound_keeps_the_part_that_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else each weight would drive out one that the next start asks for before it."""
    put(DiskCache(tmp_path, 2**30), "z")
    grown_old(tmp_path, "z")
    for start in range(2):
        cache = DiskCache(tmp_path, 3 * SIZE - 1)
        put(cache, "a", "b", "c", "d")
        assert kept(tmp_path) == {"a", "b"}
        assert cache.hits == 2 * start
    said = [r.message for r in caplog.records if "need more than" in r.message]
    assert len(said) == 2  # once in each process
    assert "raise FQCOMPILE_CACHE_SIZE" in said[0]


def test_a_weight_larger_than_the_bound_drives_nothing_out(tmp_path: Path) -> None:
    put(DiskCache(tmp_path, 2**30), "a")
    DiskCache(tmp_path, 10 * SIZE).get_or_make("b", lambda: entry(rows=50_000))
    assert kept(tmp_path) == {"a"}


def test_what_another_process_has_kept_meanwhile_is_not_written_again(tmp_path: Path) -> None:
    def make() -> Entry:
        put(DiskCache(tmp_path, 3 * SIZE), "a")
        return entry(seed=ord("a"))

    cache = DiskCache(tmp_path, 3 * SIZE)
    cache.get_or_make("a", make)
    inode = (tmp_path / "a.safetensors").stat().st_ino
    put(cache, "b", "c", "d")
    assert kept(tmp_path) == {"a", "b", "c"}  # it counts as used here
    assert (tmp_path / "a.safetensors").stat().st_ino == inode


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of another"])
def test_a_damaged_entry_is_made_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fqcompile")
    put(DiskCache(tmp_path, 2**30), "a", "b")
    path = tmp_path / "a.safetensors"
    raw = path.read_bytes()
    other = (tmp_path / "b.safetensors").read_bytes()
    flipped = raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:]
    bad = {"cut": raw[:-1], "flipped": flipped, "empty": b"", "of another": other}[damage]
    path.write_bytes(bad)
    cache = DiskCache(tmp_path, 2**30)
    assert_same(cache.get_or_make("a", lambda: entry(seed=5)), entry(seed=5))
    assert (cache.hits, cache.misses) == (0, 1)
    assert re.search(r"a\.safetensors: (CorruptEntry|CheckpointError)", caplog.text)
    assert_same(DiskCache(tmp_path, 2**30).get_or_make("a", unwanted), entry(seed=5))


def test_a_damaged_entry_is_removed_where_nothing_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(UnquantizableWeight):
        DiskCache(tmp_path, 2**30).get_or_make("a", _refuse)
    assert kept(tmp_path) == set()


def _refuse() -> Entry:
    raise UnquantizableWeight("no")


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".part").write_bytes(b"x" * 10_000_000)
    put(DiskCache(tmp_path, 10 * SIZE), "a")
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", ".lock"}
    assert_same(DiskCache(tmp_path, 2**30).get_or_make("a", unwanted), entry(seed=ord("a")))


def test_where_nothing_can_be_kept_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = DiskCache(tmp_path / "file" / "weights", 2**30)
    for key in "ab":
        made = entry(seed=ord(key))
        assert_same(cache.get_or_make(key, lambda made=made: made), made)
    assert cache.usage() == Usage(0, 0)
    (said,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot be kept" in said
    assert "set FQCOMPILE_CACHE_DIR" in said
