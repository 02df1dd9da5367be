"""Changed manifests, headers and tensors: refused with our error, or loaded right; never else."""

import copy
import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fqcompile
from fqcompile.checkpoint.packed_record import METHOD
from fqcompile.errors import CheckpointError
from tests.checkpoint.small_models import Small, contents, small
from tests.tiers import examples

RUNS = examples(1000)
JUNK: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**63, 10**30, 0.5, float("nan"), "", "x", "../x", "F32", "buffer"),
    *(
        [],
        [0],
        [2**62, 2**62],
        {},
        {"a": 1},
        "\x1b[31m",
        "a\nb",
        "a\0b",
        "..",
        "/etc/passwd",
        "x" * 9999,
    ),
    *(10**400, [2**62] * 999, [0, 2**63], {"\x1b": {"\n": []}}, [[[[[]]]]]),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return fqcompile.save(small(), tmp_path)


def _damaged(data: bytes, rng: random.Random, end: int) -> bytes:
    """Bytes ahead of `end` changed, removed, inserted, moved, or all after them cut off."""
    changed = bytearray(data)
    at, length = rng.randrange(end), rng.randint(1, 16)
    kind = rng.randrange(5)
    if kind == 0:
        changed[at] ^= rng.randint(1, 255)
    elif kind == 1:
        del changed[at : at + length]
    elif kind == 2:
        changed[at:at] = rng.randbytes(length)
    elif kind == 3:
        other = rng.randrange(end)
        changed[at : at + length] = data[other : other + length]
    else:
        del changed[at:]
    return bytes(changed)


def _outcome(directory: Path, expected: dict[str, Any]) -> str:
    """What became of loading; anything but our error goes through."""
    try:
        loaded = fqcompile.load(Small, directory)
    except CheckpointError as error:
        assert str(directory) in str(error)
        return "refused"
    assert contents(loaded) == expected
    return "right"


@pytest.mark.parametrize("what", ["manifest", "header", "shard"])
def test_changed_bytes_are_noticed(saved: Path, what: str) -> None:
    path = saved / "fqcompile.json"
    if what != "manifest":
        (path,) = saved.glob("*.safetensors")
    data, expected, rng = path.read_bytes(), contents(small()), random.Random(what)
    end = 8 + int.from_bytes(data[:8], "little") if what == "header" else len(data)
    outcomes = Counter[str]()
    for _ in range(RUNS):
        damaged = _damaged(data, rng, end)
        path.write_bytes(damaged)
        outcome = _outcome(saved, expected)
        outcomes[outcome] += 1
        if what != "manifest":  # there, white space may change
            assert outcome == ("right" if damaged == data else "refused")
    assert outcomes["refused"] > 0.9 * RUNS, outcomes


def test_manifests_that_lie_and_are_signed_are_never_the_end_of_the_process(saved: Path) -> None:
    """Whoever signs a lie may be believed; but what cannot be is refused with our error."""
    path = saved / "fqcompile.json"
    content = json.loads(path.read_bytes())["content"]
    rng, outcomes = random.Random(0), Counter[str]()
    for _ in range(RUNS):
        lie = copy.deepcopy(content)
        for _ in range(rng.randint(1, 2)):
            _change(lie, rng)
        text = json.dumps(lie, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        whole = {"format": "fqcompile", "version": 1, "sha256": digest, "content": lie}
        path.write_text(json.dumps(whole))
        try:
            model = fqcompile.load(Small, saved)
        except CheckpointError as error:
            assert str(error).isprintable(), "a terminal would obey it"
            assert len(str(error)) < 2000
            outcomes["refused"] += 1
            continue
        outcomes["loaded"] += 1
        model(torch.arange(20)[None])
    assert min(outcomes.values()) > 0.05 * RUNS, outcomes


def test_records_in_headers_that_lie_are_refused_by_name_or_believed(tmp_path: Path) -> None:
    """Those of `save_pretrained`, which nothing signs; a lie that fits the tensors is believed."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    dense: Any = transformers.LlamaForCausalLM(config)
    fqcompile.quantize_(dense, calibration=None, granularity=32, min_elements=1024)
    fqcompile.save(dense, tmp_path)
    (tmp_path / "fqcompile.json").unlink()
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[METHOD])
    rng, outcomes = random.Random(0), Counter[str]()
    for _ in range(RUNS // 2):
        lie = copy.deepcopy(said)
        for _ in range(rng.randint(1, 2)):
            _change(lie["weights"], rng)
            if lie["weights"] and rng.random() < 0.3:  # the tensors of another, for both or in part
                one, other = (lie["weights"][rng.choice(list(lie["weights"]))] for _ in "ab")
                if isinstance(one, dict) and isinstance(other, dict):
                    one |= {
                        key: other[key]
                        for key in ("codes", "scale")
                        if rng.random() < 0.7 and key in other
                    }
        save_file(tensors, path, metadata={METHOD: json.dumps(lie)})
        try:
            model: Any = fqcompile.load(None, tmp_path)
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 2000
            assert str(tmp_path) in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["loaded"] += 1
        parts = [part for r in lie["weights"].values() for part in (r["codes"], r["scale"])]
        assert len(parts) == len(set(parts))
        assert model(torch.arange(8)[None]).logits.shape == (1, 8, 64)
    assert outcomes["refused"] > 0.5 * RUNS // 2 and outcomes["loaded"], outcomes


def _change(content: Any, rng: random.Random) -> None:
    """One leaf, key or entry, somewhere below the tensors, packed weights, slots and shards."""
    top = rng.choice([name for name in content if name not in ("sites", "options", "versions")])
    parent, key, value = content, top, content[top]
    while isinstance(value, dict | list) and value and rng.random() < 0.9:
        parent, key = (
            value,
            rng.choice(list(value) if isinstance(value, dict) else range(len(value))),
        )
        value = parent[key]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["more", *parent])] = value
    elif kind == 2 and isinstance(value, int):
        parent[key] = value + rng.choice([-1, 1, 64, 2**40])
    else:
        parent[key] = rng.choice(JUNK)
