"""Changed configs, headers and cut files: refused with file and key, or read right; never else."""

import copy
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

import fqcompile
from fqcompile.checkpoint.source import read_config, read_tensors
from fqcompile.errors import CheckpointError
from fqcompile.interop.load import READERS, _method
from tests.interop.models import make
from tests.interop.writers import arguments, awq_parts, gptq_parts, write_each_layer, write_four_bit
from tests.tiers import examples

RUNS = examples(250)
JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 16, 2**63, 0.5, "", "x", "int", "group", "re:(", "re:.*"),
    *(
        [],
        [0],
        ["x"],
        {},
        {"a": 1},
        "\x1b[31m",
        "a\nb\0",
        "../x",
        "re:(a+)+$",
        "re:(.*.*)*!",
        "x" * 9999,
    ),
    *(
        10**400,
        float("inf"),
        [[[[]]] * 9] * 9,
        {"\x1b[2J": {"\n": []}},
        "kernels-community/flash-attn",
    ),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind."""
    root = tmp_path_factory.mktemp("sources")
    make("llama", root / "plain")
    schemes = {"self_attn": arguments(4, 32), "mlp": arguments(8, None)}
    write_each_layer(root / "plain", root / "compressed-tensors", schemes)
    for name, parts in (("gptq", gptq_parts), ("awq", awq_parts)):
        options = {"quant_method": name, "desc_act": False, "version": "gemm"}
        zeros = lambda rng, shape: rng.integers(8, 9, shape)  # noqa: E731
        write_four_bit(root / "plain", root / name, parts, options, zeros)
    return {name: root / name for name in ("compressed-tensors", "gptq", "awq")}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a piece of JSON."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def changed(content: Any, rng: random.Random) -> tuple[Any, str]:
    """Something replaced, removed or added; and the key."""
    result = copy.deepcopy(content)
    *path, key = rng.choice(places(result))
    parent = result
    for step in path:
        parent = parent[step]
    kind = rng.randrange(3)
    if kind == 0:
        parent[key] = copy.deepcopy(rng.choice(JUNK))
    elif kind == 1:
        del parent[key]
    elif isinstance(parent, dict):
        key = "made_up"
        parent[key] = rng.choice(JUNK)
    return result, str(key)


def copy_of(source: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def outcome(action: Callable[[], object], directory: Path) -> str:
    """What became of it; anything but our error goes through."""
    try:
        action()
    except CheckpointError as error:
        assert str(directory) in str(error), f"no file is named: {error}"
        assert str(error).isprintable(), "a terminal would obey it"
        assert len(str(error)) < 2000
        return str(error)
    return "read"


@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq", "awq"])
def test_changed_quantization_configs(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(sources[kind], tmp_path / "changed")
    path = directory / "config.json"
    config = json.loads(path.read_bytes())
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(RUNS):
        quantization, key = changed(config["quantization_config"], rng)
        path.write_text(json.dumps({**config, "quantization_config": quantization}))
        text = outcome(lambda: read_headers(directory, kind), directory)
        outcomes["read" if text == "read" else "refused"] += 1
        if text != "read" and kind == "compressed-tensors":
            assert "quantization_config" in text or ".weight" in text or "_proj" in text, (
                key,
                text,
            )
    assert outcomes["refused"] > RUNS // 10, outcomes
    assert outcomes["read"] > RUNS // 10, outcomes


def read_headers(directory: Path, kind: str) -> None:
    """As far as config and headers go: the checker, and the readers of `load`."""
    config = read_config(directory)
    if not config.get("quantization_config"):
        return
    read = READERS.get(_method(config, directory))
    if read is not None:
        read(config, read_tensors(directory), str(directory / "config.json"))
    if config["quantization_config"]["quant_method"] == "compressed-tensors":
        for engine in ("vllm", "sglang", "transformers"):
            fqcompile.check(directory, engine)


@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq", "awq"])
def test_changed_and_cut_headers(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(sources[kind], tmp_path / "changed")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    rng = random.Random(1)
    refused = 0
    for _ in range(RUNS):
        entries, _ = changed(header, rng)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        refused += outcome(lambda: read_headers(directory, kind), directory) != "read"
    assert refused > RUNS // 2
    for cut in sorted(rng.sample(range(len(data)), 20)):
        path.write_bytes(data[:cut])
        text = outcome(lambda: fqcompile.load(None, directory), directory)
        assert "model.safetensors" in text, text


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq", "awq"])
def test_whole_loads_of_changed_configs(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """All of the config: whatever transformers makes of it is our error, soon."""
    directory = copy_of(sources[kind], tmp_path / "changed")
    path = directory / "config.json"
    config = json.loads(path.read_bytes())
    rng = random.Random(kind)
    outcomes: Counter[bool] = Counter()
    start = time.process_time()
    for _ in range(60):
        other, _ = changed(config, rng)
        path.write_text(json.dumps(other))
        outcomes[outcome(lambda: fqcompile.load(None, directory), directory) == "read"] += 1
    assert min(outcomes.values()) > 5, outcomes
    assert time.process_time() - start < 120


def test_whole_loads_of_changed_checkpoints(sources: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(sources["compressed-tensors"], tmp_path / "changed")
    path = directory / "config.json"
    config = json.loads(path.read_bytes())
    rng = random.Random(2)
    for _ in range(15):
        quantization, _ = changed(config["quantization_config"], rng)
        path.write_text(json.dumps({**config, "quantization_config": quantization}))
        outcome(lambda: fqcompile.load(None, directory), directory)


def test_a_missing_shard_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(sources["compressed-tensors"], tmp_path / "changed")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    files = {
        "a.weight": "model-00001-of-00002.safetensors",
        "b.weight": "model-00002-of-00002.safetensors",
    }
    index = json.dumps({"weight_map": files})
    (directory / "model.safetensors.index.json").write_text(index)
    for action in (lambda: fqcompile.load(None, directory), lambda: fqcompile.check(directory)):
        with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
            action()
