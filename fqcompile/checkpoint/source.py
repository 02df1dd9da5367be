"""A Hugging Face checkpoint in a local directory: its config, and the location of each tensor.

Also recognizes other contents of a directory passed to `load`, and names the right command.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqcompile.checkpoint.manifest import JOURNAL, MANIFEST, SHARD
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import TensorPlace, read_header
from fqcompile.files.untrusted import check_name, read_json, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The ends of tensors' names that only quantized layers have; FOREIGN: whatever a config says.
FOREIGN = {
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "SCB": "bitsandbytes", "W_q": "HQQ",
}  # fmt: skip
_PACKED = {**FOREIGN, "qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors"}
# Files that begin so are no model's under another name.
_OTHERS = {
    SHARD: f", a shard of a save of fqcompile without its {MANIFEST}; copy that here too",
    "consolidated": ", Mistral's own format, whose tensors have other names; download the files "
    "model*.safetensors of the same model",
    "diffusion_pytorch_model": ", a model of diffusers; load it there, from_pretrained(directory), "
    "after import fqcompile.integrations.diffusers if it is packed, else call fqcompile.quantize_("
    "model) then",
    "adapter_model": ", an adapter of peft, which is not a model; load the base model, quantize "
    "it, and give both to PeftModel.from_pretrained",
}
# Files that belong to a checkpoint besides weights: configs, tokenizers, templates, code, licenses.
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_LONGEST_FILE_NAME = 255  # bytes, on Linux and macOS
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class Source:
    """The parsed config, and the tensors by their names in the checkpoint."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorPlace]

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.tensors.values())

    @property
    def identity(self) -> list[Any]:
        """A value that changes when a weight file is replaced."""
        stats = {path: path.stat() for path in {place.path for place in self.tensors.values()}}
        files = sorted((path.name, s.st_size, s.st_mtime_ns) for path, s in stats.items())
        return [str(self.directory.resolve()), self.config, files]


def other_files(directory: Path) -> dict[str, bytes]:
    """The files that belong to the weights: configs, tokenizers, templates, licenses."""
    files = (path for path in sorted(directory.iterdir()) if path.is_file())
    return {path.name: path.read_bytes() for path in files if _is_copied(path)}


def open_source(directory: Path) -> Source:
    """Read the config and the headers, but no tensor.

    Raises:
        CheckpointError: it is not a checkpoint, has no safetensors files, lacks one of them, or is
            quantized already.
    """
    config = read_config(directory)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        named = shown(method or "quantization_config")
        raise CheckpointError(
            f"{directory} is quantized already ({named}); give the checkpoint that it was made from"
        )
    tensors = read_tensors(directory)
    packed = packed_by(tensors)
    if packed is not None:
        raise CheckpointError(
            f"{directory} is quantized already: {packed[1]} is of {packed[0]}; give the checkpoint "
            "that it was made from"
        )
    return Source(directory, config, tensors)


def packed_by(names: Iterable[str]) -> tuple[str, str] | None:
    """The program that packed these tensors, and one of their names; None if not packed."""
    last = {name.rpartition(".")[2]: name for name in names}
    return next(((program, last[end]) for end, program in _PACKED.items() if end in last), None)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        CheckpointError: it is missing or not a JSON object; or the directory is a save of ours.
    """
    if _is_saved(directory):
        raise CheckpointError(
            f"{directory} was saved by fqcompile and is quantized already; load it: "
            f"fqcompile.load(None, {str(directory)!r}); or write it for an engine: "
            f"{export_command(directory)}"
        )
    return _json(directory / "config.json", directory)


def export_command(directory: Path) -> str:
    """What to type, for errors."""
    return f"fqcompile export {shlex.quote(str(directory))} OUT, which checks it too"


def _is_saved(directory: Path) -> bool:
    """Whether a manifest there is of the weights; beside others it says nothing of these."""
    there = {name for name in (MANIFEST, SINGLE, INDEX) if (directory / name).is_file()}
    files = _weight_map(directory / INDEX).values() if INDEX in there else ()
    return there - {INDEX} == {MANIFEST} and all(file.startswith(SHARD) for file in files)


def read_tensors(directory: Path) -> dict[str, TensorPlace]:
    """The location of each tensor, from the headers of the files.

    Raises:
        CheckpointError: there are no safetensors files, or one is missing, damaged or cut short.
    """
    tensors: dict[str, TensorPlace] = {}
    for path in weight_files(directory):
        tensors |= read_header(path).tensors
    if (directory / INDEX).is_file() and not (directory / SINGLE).is_file():
        _check_index(directory / INDEX, tensors)
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """The weight files, as `from_pretrained` finds them.

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        names = sorted(set(_weight_map(directory / INDEX).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {', '.join(missing)}, which {INDEX} names; download them"
            )
        return [directory / name for name in names]
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(
            f"{directory} has its weights in pickles ({pickled[0]}), which may run any code and "
            "are never opened; convert them: from_pretrained(...).save_pretrained(new_directory)"
        )
    raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}{_other(directory)}")


def _other(directory: Path) -> str:
    """A description of weight files with other names, and the remedy."""
    names = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors")
    if not names:
        return ""
    own = next((text for start, text in _OTHERS.items() if names[0].startswith(start)), None)
    if own is None and len(names) == 1:
        old, new = (shlex.quote(str(directory / name)) for name in (names[0], SINGLE))
        own = f"; if it holds all weights, rename it: mv {old} {new}"
    return f", but {shown(names[0])}{own or '; download the index that names all of them'}"


def _weight_map(path: Path) -> dict[str, str]:
    found = _json(path, path.parent).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(f, str) for f in found.values()):
        raise CheckpointError(f"{path} has no weight_map of files beside it; download it again")
    for name in {*found, *found.values()}:
        check_name(name, f"{path}: weight_map")
    for file in found.values():
        if Path(file).name != file or file == ".." or len(file.encode()) > _LONGEST_FILE_NAME:
            raise CheckpointError(
                f"{path}: weight_map names {shown(file)}, which is no file beside it; download it "
                "again"
            )
    return found


def _check_index(path: Path, tensors: dict[str, TensorPlace]) -> None:
    missing = [name for name in _weight_map(path) if name not in tensors]
    if missing:
        raise CheckpointError(
            f"no file has tensor {missing[0]}, which {path} names ({len(missing)} in all); "
            "download the checkpoint again"
        )


def _json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {path.name}: it is not a Hugging Face checkpoint; give a local "
            "directory that save_pretrained wrote or that was downloaded"
        )
    return read_json(path)


def _is_copied(path: Path) -> bool:
    if path.name.endswith(".index.json") or path.name.startswith("fqcompile."):
        return False
    return path.suffix in _COPIED or path.name.startswith(_LICENCES)


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
    "adapter_config.json": "holds an adapter of peft ({0}), which is not a model; load the base "
    "model, quantize it, and give both to PeftModel.from_pretrained",
    **_OF_FILES,
}


def recognized(path: Path) -> str:
    """A description of a directory that no `save` of ours wrote, as a sentence about "it".

    Raises:
        CheckpointError: its safetensors files are damaged.
    """
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _text(path, [path.name], _OF_FILES)
    if _HUB_NAME.fullmatch(str(path)):
        return (
            "it is not a directory here; if it is a name on the Hugging Face hub, download it "
            f"first: hf download {path} --local-dir {path.name}; then: fqcompile quantize "
            f"{path.name} OUT"
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
