"""Sizes in a config that no file justifies, and configs of absurdly many parts: bounded memory."""

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fqcompile
from fqcompile.checkpoint import source
from fqcompile.checkpoint.hugging_face import BoundedComputing
from fqcompile.errors import CheckpointError
from fqcompile.files.untrusted import read_json
from tests.checkpoint.test_hostile_files import _llama, _refused

transformers: Any = pytest.importorskip("transformers", reason="the demo extra is not installed")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Whoever takes 6 GiB more gets an error of the allocator, and not the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _gpt_j(directory: Path) -> dict[str, Any]:
    """Computes sines for each position; nothing in its files is as long."""
    torch.manual_seed(0)
    own = {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "vocab_size": 128}
    config = transformers.GPTJConfig(**own, n_positions=64)
    transformers.GPTJForCausalLM(config).save_pretrained(directory)
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc tells the memory in use")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        (_llama, "head_dim", 2**31),
        (_llama, "head_dim", 10**10),
        (_llama, "hidden_size", 2**31),
        (_gpt_j, "n_positions", 2 * 10**9),
        (_gpt_j, "rotary_dim", 2**31),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sizes_that_no_file_justifies(
    family: Any, key: str, value: int, packed: bool, tmp_path: Path, little_memory: None
) -> None:
    content = {**family(tmp_path / "in"), key: value}
    if packed:  # by its config; a layer that is not packed is a dense one
        content["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        save_file(_with_one_packed(tmp_path / "in"), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(content))
    own = "bytes that no file holds|in the checkpoint and|is no weight of|cannot be built"
    if packed:
        _refused(lambda: fqcompile.load(None, tmp_path / "in"), own)
    else:
        _refused(lambda: fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out"), own)


def _with_one_packed(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    n, k = tensors.pop(name).shape
    layer = name.removesuffix(".weight")
    tensors[f"{layer}.qweight"] = torch.zeros(k // 8, n, dtype=torch.int32)
    tensors[f"{layer}.qzeros"] = torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32)
    tensors[f"{layer}.scales"] = torch.ones(k // 32, n, dtype=torch.float16)
    return tensors


def test_what_a_class_computes_is_counted_before_it_is_made() -> None:
    """Results on the CPU alone, of tensors and of none; views take nothing."""
    with BoundedComputing("DIRECTORY") as bounded:
        torch.arange(10, dtype=torch.int64)
        torch.empty(1 << 40, device="meta").sin()
        one = torch.ones(4, 1)
        assert bounded.made == 96
        one.expand(4, 1 << 40)
        assert (one.nonzero().shape, bounded.made) == ((4, 2), 96)
        one.t() * one
        assert bounded.made == 96 + 64
        for absurd in (
            lambda: torch.arange(0, 2**31, 2),
            lambda: torch.outer(torch.ones(1 << 17), torch.ones(1 << 17)),
            lambda: torch.empty_like(torch.empty(1 << 40, device="meta"), device="cpu"),
        ):
            with pytest.raises(CheckpointError, match="DIRECTORY: its config asks for"):
                absurd()


def test_a_config_of_millions_of_lists(tmp_path: Path) -> None:
    content = _llama(tmp_path / "in")
    text = json.dumps(content)[:-1] + ', "more": [' + ",".join(["[]"] * 13_000_000) + "]}"
    (tmp_path / "in" / "config.json").write_text(text)
    for action in (
        lambda: fqcompile.load(None, tmp_path / "in"),
        lambda: fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out"),
    ):
        start = time.process_time()
        _refused(action, "more than 2000000 lists and objects")
        assert time.process_time() - start < 3


def test_a_config_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _llama(tmp_path / "in")
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "in" / "config.json").write_text(json.dumps(content))
    save_file(_with_one_packed(tmp_path / "in"), tmp_path / "in" / "model.safetensors")
    parsed = []
    monkeypatch.setattr(source, "read_json", lambda path: parsed.append(path) or read_json(path))
    fqcompile.load(None, tmp_path / "in")
    assert [path.name for path in parsed] == ["config.json"]
