"""What lies where somebody expects a model for `load`, and the command for it."""

import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from fqcompile.checkpoint.journal import JOURNAL
from fqcompile.checkpoint.source import FOREIGN, INDEX, packed_by, read_tensors
from fqcompile.files.json_text import shown

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BESIDE = ("quantize_config.json", "quant_config.json")
_QUANTIZE = "fqcompile quantize CHECKPOINT OUT"
_WRITERS = f"fqcompile.save(model, directory) and `{_QUANTIZE}` write such directories"

_GGUF = (
    "holds a GGUF file of llama.cpp ({0}), which only llama.cpp runs as it is; give the checkpoint "
    f"that it was made from to: {_QUANTIZE}; or load it dense, transformers' "
    "from_pretrained(directory, gguf_file=...), and call fqcompile.quantize_(model)"
)
_PICKLE = (
    "holds weights in a pickle ({0}), which may run any code and is never opened; convert it with "
    "transformers, from_pretrained(directory).save_pretrained(OTHER), then: fqcompile quantize "
    "OTHER OUT"
)
_TENSORS = (
    "holds tensors ({0}) and no config.json that names their model; load them into yours, "
    "safetensors.torch.load_model(model, file), and call fqcompile.quantize_(model)"
)
_NOTHING = "holds no model that is known here ({0})"


_PLAIN = (
    "holds a plain checkpoint of Hugging Face ({0}), which is not quantized yet; run: fqcompile "
    "quantize {1} OUT; then fqcompile.load(None, OUT)"
)
_OF_FILES = {".gguf": _GGUF, ".safetensors": _TENSORS, **dict.fromkeys(_PICKLES, _PICKLE)}
_OF_DIRECTORIES = {
    JOURNAL: "holds an unfinished run ({0}); repeat its command with --resume",
    "export.json": "holds an unfinished export ({0}); repeat its command with --resume",
    "model_index.json": "holds a pipeline of diffusers ({0}); load it there, and call "
    "fqcompile.quantize_(pipeline.transformer)",
    "adapter_config.json": "holds an adapter of peft ({0}), which is no model; load the base "
    "model, quantize it, and give both to PeftModel.from_pretrained",
    **_OF_FILES,
}


def recognized(path: Path) -> str:
    """A sentence without its subject, the path, about what no `save` of ours has written.

    Raises:
        CheckpointError: its safetensors files are damaged.
    """
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _text(path, [path.name], _OF_FILES)
    if _HUB_NAME.fullmatch(str(path)):
        return (
            "it is no directory here; if it is a name on the Hugging Face hub, download it first: "
            f"hf download {path} --local-dir {path.name}; then: fqcompile quantize {path.name} OUT"
        )
    return f"it is not there; {_WRITERS}"


def _directory(path: Path) -> str:
    names = sorted(found.name for found in path.iterdir())
    if not names:
        return f"it is empty; {_WRITERS}"
    weights = any(name.endswith(".safetensors") or name == INDEX for name in names)
    if "config.json" not in names or not weights:
        return _text(path, names, _OF_DIRECTORIES)
    packed = packed_by(read_tensors(path))
    if packed is None:
        return _text(path, ["config.json"], {"config.json": _PLAIN})
    program, tensor = packed
    if program in FOREIGN.values():
        return (
            f"it holds {program} weights ({tensor}), which are not read here; give the checkpoint "
            f"that it was made from to: {_QUANTIZE}"
        )
    lies = next((f"; it lies in {name}" for name in _BESIDE if name in names), "")
    return (
        f"it holds {program} weights ({tensor}) and a config.json without "
        f"quantization_config, which says how they are packed{lies}; put it there, with its "
        f"quant_method, and load again: fqcompile.load(None, {str(path)!r})"
    )


def _text(path: Path, names: Collection[str], known: Mapping[str, str]) -> str:
    found = (
        (text, name) for end, text in known.items() for name in names if name.lower().endswith(end)
    )
    text, name = next(found, (_NOTHING, ", ".join(sorted(names)[:3])))
    return f"it {text.format(shown(name), shlex.quote(str(path)))}"
