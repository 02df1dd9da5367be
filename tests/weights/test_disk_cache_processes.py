"""One cache directory under several processes, killed ones, and those that may not write."""

import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fqcompile.weights.disk_cache import DiskCache
from tests.weights.test_disk_cache import SIZE, kept, put, unwanted
from tests.weights.test_disk_cache_entries import assert_same, entry

FORK = multiprocessing.get_context("fork")


def in_child(task: Callable[[], None], **limits: Any) -> Any:
    """A forked process that runs `task`; its exit status is 0 where nothing was raised."""
    process = FORK.Process(target=task, **limits)
    process.start()
    return process


def _use_at_random(directory: Path, limit: int, seed: int, times: int) -> None:
    draw = random.Random(seed)
    for _ in range(times):
        cache = DiskCache(directory, limit)
        for number in draw.sample(range(12), 4):
            made = entry(seed=number)
            assert_same(cache.get_or_make(f"{number}", lambda made=made: made), made)
        assert cache.usage().nbytes <= limit


def test_four_processes_read_and_write_one_directory(tmp_path: Path) -> None:
    limit = 6 * SIZE
    children = [
        in_child(lambda seed=seed: _use_at_random(tmp_path, limit, seed, 40)) for seed in range(4)
    ]
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    assert not (tmp_path / ".part").exists()
    for key in kept(tmp_path):
        found = DiskCache(tmp_path, limit).get_or_make(key, unwanted)
        assert_same(found, entry(seed=int(key)))


def test_killed_processes_leave_whole_entries_alone(tmp_path: Path) -> None:
    draw = random.Random(0)
    for seed in range(25):
        child = in_child(lambda seed=seed: _use_at_random(tmp_path, 2**30, seed, 10**6))
        time.sleep(draw.uniform(0.005, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        for path in tmp_path.glob("*.safetensors"):
            found = DiskCache(tmp_path, 2**30).get_or_make(path.stem, unwanted)
            assert_same(found, entry(seed=int(path.stem)))
            if draw.random() < 0.5:
                path.unlink()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user may enter, as pytest's own may not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_a_directory_that_may_only_be_read_is_read(open_folder: Path) -> None:
    folder = open_folder / "weights"
    put(DiskCache(folder, 2**30), "a")

    def use() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        cache = DiskCache(folder, 2**30)
        assert_same(cache.get_or_make("a", unwanted), entry(seed=ord("a")))
        assert_same(cache.get_or_make("b", entry), entry())
        assert not cache._writable

    folder.chmod(0o555)
    child = in_child(use)
    child.join(60)
    folder.chmod(0o755)
    assert child.exitcode == 0
    assert kept(folder) == {"a"}


def test_a_full_disk_keeps_nothing_more_and_loses_nothing(tmp_path: Path) -> None:
    """A bound on the size of files stands for it: writing fails halfway."""

    def use() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        cache = DiskCache(tmp_path, 2**30)
        put(cache, "a")
        made = entry(rows=5000)
        assert_same(cache.get_or_make("b", lambda: made), made)
        assert not cache._writable

    child = in_child(use)
    child.join(60)
    assert child.exitcode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", ".lock"}  # and no half of b
    put(DiskCache(tmp_path, 2**30), "c")
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "c.safetensors", ".lock"}
