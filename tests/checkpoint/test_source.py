"""Directories that are no checkpoint that can be quantized: each is refused with what to do."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fqcompile
from fqcompile.checkpoint.source import open_source, other_files
from fqcompile.errors import CheckpointError

CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _write(directory: Path, config: object = CONFIG, index: object = None) -> None:
    """A checkpoint of two files."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, name in enumerate(("a.weight", "b.weight")):
        file = f"model-{number}.safetensors"
        save_file({name: torch.ones(2, 3)}, directory / file)
        weight_map[name] = file
    text = json.dumps({"weight_map": weight_map} if index is None else index)
    (directory / "model.safetensors.index.json").write_text(text)


def _plain(directory: Path) -> None:
    _write(directory)


def _without(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        _write(directory)
        (directory / name).unlink()

    return make


def _with_index(index: object) -> Callable[[Path], None]:
    return lambda directory: _write(directory, index=index)


def _quantized(directory: Path) -> None:
    _write(directory, {**CONFIG, "quantization_config": {"quant_method": "gptq"}})


def _pickled(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(print))


def _no_json(directory: Path) -> None:
    _write(directory)
    (directory / "config.json").write_text("{")


def _cut(directory: Path) -> None:
    _write(directory)
    path = directory / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "has no config.json: it is not a Hugging Face checkpoint"),
        (_without("model.safetensors.index.json"), r"has neither model\.safetensors nor"),
        (_without("model-1.safetensors"), r"lacks model-1\.safetensors, which"),
        (_with_index({}), "has no weight_map"),
        (_with_index([]), "not a JSON object"),
        (
            _with_index({"weight_map": {"a.weight": "../a"}}),
            "names ../a, which is no file",
        ),
        (_with_index({"weight_map": {"c": "model-0.safetensors"}}), "no file has tensor c"),
        (_quantized, r"is quantized already \(gptq\)"),
        (_pickled, r"in pickles \(pytorch_model\.bin\).*never opened; convert them"),
        (_no_json, r"config\.json is not JSON"),
        (_cut, r"model-1\.safetensors was cut short: tensor b\.weight"),
    ],
)
def test_what_is_wrong_is_said(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message):
        fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        fqcompile.quantize_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    _write(tmp_path / "in")
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "in" / ".." / "in")


@pytest.mark.parametrize("names", [None, [], ["NoSuchModel"], ["LlamaConfig"], [3]])
def test_a_class_that_transformers_does_not_have_is_named(names: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the demo extra is not installed")
    _write(tmp_path / "in", {**CONFIG, "architectures": names})
    named = (names or [None])[0]
    with pytest.raises(CheckpointError, match=f"holds a {named}, which is not a model class"):
        fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out")


def test_tensors_and_other_files_are_found(tmp_path: Path) -> None:
    directory = tmp_path / "in"
    _write(directory)
    for name in ("tokenizer.json", "LICENSE.txt", "chat_template.jinja", "tokenizer.model"):
        (directory / name).write_text(name)
    for name in ("original.pth", "model.onnx", "README.md", "optimizer.bin", "fqcompile.json"):
        (directory / name).write_text(name)
    (directory / "onnx").mkdir()
    source = open_source(directory)
    assert sorted(source.tensors) == ["a.weight", "b.weight"]
    assert source.nbytes == 2 * 2 * 3 * 4
    assert other_files(source.directory).keys() == {
        "config.json", "tokenizer.json", "LICENSE.txt", "chat_template.jinja", "tokenizer.model"
    }  # fmt: skip


def test_one_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    directory = tmp_path / "in"
    _write(directory)
    save_file({"c": torch.ones(1)}, directory / "model.safetensors")
    assert sorted(open_source(directory).tensors) == ["c"]
