"""What is no model of ours: `load` says what it found, and a command that helps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fqcompile
from fqcompile.errors import CheckpointError
from fqcompile.interop.check import check
from tests.checkpoint.small_models import Small, contents, small
from tests.helpers import finequant, report


def _plain(directory: Path) -> None:
    save_file({"model.a.weight": torch.zeros(2, 2)}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


def _files(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).write_bytes(b"{}")


def _packed(directory: Path, part: str) -> None:
    _plain(directory)
    save_file({f"model.a.{part}": torch.zeros(2, 2)}, directory / "model.safetensors")


def _renamed(directory: Path, name: str) -> None:
    _plain(directory)
    (directory / "model.safetensors").rename(directory / name)


def _without_shards(directory: Path) -> None:
    _plain(directory)
    (directory / "model.safetensors").unlink()
    shards = {str(i): f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))


def _of_method(directory: Path, method: str) -> None:
    _plain(directory)
    content = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": method},
    }
    (directory / "config.json").write_text(json.dumps(content))


def _gptq(directory: Path) -> None:
    _packed(directory, "qweight")
    _files(directory, "quantize_config.json")


FOUND: dict[str, tuple[Any, str]] = {
    "plain": (_plain, "holds a plain checkpoint .*run: fqcompile quantize .* OUT"),
    "gptq": (_gptq, r"GPTQ or AWQ weights \(model\.a\.qweight\).*lies in quantize_config\.json"),
    "bnb": (
        lambda d: _packed(d, "weight.absmax"),
        r"bitsandbytes weights \(model\.a\.weight\.absmax\), which are not read.*fqcompile q",
    ),
    "bnb int8": (lambda d: _packed(d, "SCB"), "bitsandbytes weights .*made from to: fqcompile q"),
    "hqq": (lambda d: _packed(d, "W_q"), r"HQQ weights \(model\.a\.W_q\).*made from to: fqc"),
    "autogptq": (
        lambda d: _renamed(d, "gptq_model-4bit-32g.safetensors"),
        r"but gptq_model-4bit-32g\.safetensors; .*rename it: mv .*32g\.safe.*/model\.safetensors",
    ),
    "mistral": (lambda d: _renamed(d, "consolidated.safetensors"), "Mistral's own format.*downl"),
    "diffusers": (
        lambda d: _renamed(d, "diffusion_pytorch_model.safetensors"),
        r"a model of diffusers; load it there.*quantize_\(model\)",
    ),
    "our shards": (
        lambda d: _renamed(d, "fqcompile-0123abcd-00001.safetensors"),
        r"a shard of a save of fqcompile without its fqcompile\.json; copy that",
    ),
    "shards are missing": (
        _without_shards,
        r"lacks model-00001-of-00002\.safetensors, model-00002.*index\.json names; download",
    ),
    "upper case": (lambda d: _files(d, "MODEL.GGUF"), r"GGUF file of llama\.cpp \(MODEL\.GGUF"),
    "gguf": (
        lambda d: _files(d, "m-q4.gguf", "README.md"),
        r"GGUF file of llama\.cpp \(m-q4\.gguf",
    ),
    "pickle": (
        lambda d: _files(d, "config.json", "pytorch_model.bin"),
        r"pickle \(pytorch_model\.bin\).*save_pretrained\(OTHER\), then: fqcompile quantize",
    ),
    "tensors": (lambda d: _files(d, "a.safetensors"), r"tensors \(a\.saf.*load_model\(model, file"),
    "pipeline": (lambda d: _files(d, "model_index.json"), "pipeline of diffusers.*quantize_"),
    "adapter": (
        lambda d: _files(d, "adapter_config.json", "adapter_model.safetensors"),
        "adapter of peft.*load the base model",
    ),
    "unfinished run": (lambda d: _files(d, "fqcompile.journal"), "unfinished run.*--resume"),
    "unfinished export": (lambda d: _files(d, "export.json"), "unfinished export.*--resume"),
    "empty": (lambda d: None, r"is empty; fqcompile\.save.* and `fqcompile quantize"),
    "other": (lambda d: _files(d, "a.txt", "\x1b[2J.py"), r"no model that is known.*\\x1b\[2J\.py"),
    "bitsandbytes": (
        lambda d: _of_method(d, "bitsandbytes"),
        "quant_method is 'bitsandbytes'.*give the checkpoint that it was made from to: fqcompile q",
    ),
    "torchao": (
        lambda d: _of_method(d, "torchao"),
        "quant_method is 'torchao'.*fqcompile quantize",
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_a_directory_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    write, message = FOUND[kind]
    write(tmp_path)
    for model in (None,) if kind in ("bitsandbytes", "torchao") else (None, Small):
        with pytest.raises(CheckpointError, match=message) as error:
            fqcompile.load(model, tmp_path)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("part", ["weight.absmax", "SCB", "W_q", "qweight", "weight_packed"])
def test_what_is_packed_is_not_quantized_again(part: str, tmp_path: Path) -> None:
    """Whether or not a config says so."""
    _packed(tmp_path, part)
    with pytest.raises(CheckpointError, match=rf"quantized already: model\.a\.{part} is of"):
        fqcompile.quantize_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("command", ["check", "quantize"])
def test_a_directory_of_our_own_is_no_source(command: str, tmp_path: Path) -> None:
    saved = tmp_path / "my model"
    fqcompile.save(small(), saved)
    action: Any = {
        "check": lambda: check(saved),
        "quantize": lambda: fqcompile.quantize_checkpoint(saved, tmp_path / "out"),
    }[command]
    with pytest.raises(
        CheckpointError, match=r"saved by fqcompile.*fqcompile\.load\(None"
    ) as error:
        action()
    assert f"fqcompile export '{saved}' OUT" in str(error.value)


def test_commands_quote_paths(tmp_path: Path) -> None:
    for name, write in (("a b", _plain), ("a;b", lambda d: _renamed(d, "w 1.safetensors"))):
        directory = tmp_path / name
        directory.mkdir()
        write(directory)
        with pytest.raises(CheckpointError) as error:
            fqcompile.load(None, directory)
        assert f"quantize '{directory}' OUT" in str(error.value) or (
            f"mv '{directory}/w 1.safetensors' '{directory}/model.safetensors'" in str(error.value)
        )


@pytest.mark.parametrize("wrong", [None, Small(), 3])
def test_arguments_in_the_wrong_order(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in place of a directory; give the model"):
        fqcompile.load(tmp_path, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "holds tensors.*and no config.json"),
        ("model-q4.gguf", "holds a GGUF file"),
        ("model.bin", "holds weights in a pickle"),
        ("model.zip", "holds no model that is known"),
    ],
)
def test_a_file_is_named_for_what_it_is(name: str, message: str, tmp_path: Path) -> None:
    _files(tmp_path, name)
    with pytest.raises(CheckpointError, match=message):
        fqcompile.load(None, tmp_path / name)


def test_names_that_are_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hf download meta-llama/Llama-3\.2-1B --local-dir"):
        fqcompile.load(None, "meta-llama/Llama-3.2-1B")
    with pytest.raises(CheckpointError, match=r"is not there; fqcompile\.save"):
        fqcompile.load(None, tmp_path / "nowhere")


def test_a_report_is_a_plan_to_save(tmp_path: Path) -> None:
    """As it is to fake_quantize_."""
    model = small()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        finequant(model, min_elements=1024)(ids)
    fqcompile.save(model, tmp_path, plan=report())
    content = json.loads((tmp_path / "fqcompile.json").read_text())["content"]
    assert content["sites"] == json.loads(json.dumps([s.as_dict() for s in report().sites]))
    assert content["options"] == json.loads(json.dumps(dict(report().plan.options)))
    assert contents(fqcompile.load(Small, tmp_path)) == contents(model)
