"""A writer that is killed leaves the old directory or the new one, whole; never a mixture."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fqcompile
from fqcompile.checkpoint import shards
from fqcompile.checkpoint.directory import file_of, staged
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.errors import CheckpointError
from tests.checkpoint.crashes import count_operations, crash
from tests.checkpoint.small_models import Small, contents, small

SEEDS = 6  # ways to lose what was not synced
KILLS = 60  # by a signal, beside the simulated ones


@pytest.fixture(autouse=True)
def _several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [small(seed) for seed in range(3)]


def found_in(directory: Path) -> tuple[dict[str, Any], Any] | None:
    """What loads, and the config beside it; None where nothing was ever saved whole."""
    if not (directory / "fqcompile.json").exists():
        with pytest.raises(CheckpointError, match=r"has no fqcompile\.json"):
            fqcompile.load(Small, directory)
        return None
    loaded = contents(fqcompile.load(Small, directory))
    manifest = read_manifest(directory)
    return loaded, json.loads(file_of(directory, manifest, "config.json").read_text())


def state_of(model: Any) -> tuple[dict[str, Any], Any]:
    quantization = {"quantization_config": {"quant_method": "finequant"}}
    return contents(model), {
        "seed": model.config.seed, "architectures": ["Small"], **quantization
    }  # fmt: skip


def assert_clean(directory: Path) -> None:
    """Nothing but one save is there."""
    manifest = read_manifest(directory)
    assert len(manifest.shards) > 2
    expected = {"fqcompile.json", *manifest.files, *(shard.file for shard in manifest.shards)}
    assert {path.name for path in directory.iterdir()} == expected


@pytest.mark.slow
def test_power_failure_at_every_operation(models: list[Any], tmp_path: Path) -> None:
    old, new, next_one = models
    fqcompile.save(old, tmp_path / "count")
    operations = count_operations(lambda: fqcompile.save(new, tmp_path / "count"))
    seen = {"old": 0, "new": 0}
    for fails_at in range(operations):
        for seed in range(SEEDS):
            directory = tmp_path / f"{fails_at}-{seed}"
            fqcompile.save(old, directory)
            assert crash(lambda: fqcompile.save(new, directory), fails_at, seed)  # noqa: B023
            state = found_in(directory)
            assert state in (state_of(old), state_of(new)), f"operation {fails_at}, seed {seed}"
            seen["old" if state == state_of(old) else "new"] += 1
            fqcompile.save(next_one, directory)
            assert found_in(directory) == state_of(next_one)
            assert_clean(directory)
    assert operations * SEEDS >= 200
    assert min(seen.values()) > 0, seen


def test_power_failure_during_the_first_save(models: list[Any], tmp_path: Path) -> None:
    operations = count_operations(lambda: fqcompile.save(models[0], tmp_path / "count"))
    for fails_at in range(operations):
        directory = tmp_path / str(fails_at)
        assert crash(lambda: fqcompile.save(models[0], directory), fails_at, fails_at)  # noqa: B023
        assert found_in(directory) in (None, state_of(models[0]))
        fqcompile.save(models[1], directory)
        assert found_in(directory) == state_of(models[1])
        assert_clean(directory)


def test_twice_in_a_row(models: list[Any], tmp_path: Path) -> None:
    """The second writer fails while it tidies what the first left, or later."""
    rng = random.Random(0)
    for run in range(60):
        directory = tmp_path / str(run)
        fqcompile.save(models[0], directory)
        for model in models[1:]:
            crash(lambda: fqcompile.save(model, directory), rng.randrange(40), run)  # noqa: B023
        assert found_in(directory) in list(map(state_of, models))


def test_killed_by_a_signal(models: list[Any], tmp_path: Path) -> None:
    rng = random.Random(1)
    expected = list(map(state_of, models))
    fqcompile.save(models[0], tmp_path)
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            _save_for_ever(models, tmp_path)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert found_in(tmp_path) in expected
    fqcompile.save(models[1], tmp_path)
    assert_clean(tmp_path)


def _save_for_ever(models: list[Any], directory: Path) -> None:
    try:
        while True:
            for model in models:
                fqcompile.save(model, directory)
    finally:
        os._exit(1)


def test_an_error_while_saving_leaves_the_old_save_alone(
    models: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fqcompile.save(models[0], tmp_path)
    before = {path.name for path in tmp_path.iterdir()}

    def no_space(*_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fqcompile.checkpoint.save.stage", no_space)
        with pytest.raises(CheckpointError, match="No space left"):
            fqcompile.save(models[1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert found_in(tmp_path) == state_of(models[0])


def test_a_committed_save_is_finished_by_the_next_writer(
    models: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the manifest and the other files: a reader finds those of the manifest."""
    fqcompile.save(models[0], tmp_path)
    renames = []
    for fails_at in range(count_operations(lambda: fqcompile.save(models[0], tmp_path))):
        directory = tmp_path / str(fails_at)
        fqcompile.save(models[0], directory)
        crash(lambda: fqcompile.save(models[1], directory), fails_at, 0)  # noqa: B023
        manifest = read_manifest(directory)
        if staged(directory, "config.json", manifest.generation).exists():
            renames.append(fails_at)
            assert json.loads((directory / "config.json").read_text())["seed"] == 0
            assert found_in(directory) == state_of(models[1])
    assert renames
