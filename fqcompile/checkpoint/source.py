"""A checkpoint of Hugging Face in a local directory: its config, and where each tensor lies."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqcompile.checkpoint.json_text import check_name, read_json, shown
from fqcompile.checkpoint.safetensors_file import TensorPlace, read_header
from fqcompile.errors import CheckpointError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What a directory of weights needs beside them: configs, tokenizers, templates, code, licences.
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class Source:
    """The config as JSON has it, and the tensors by their names in the checkpoint."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorPlace]

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.tensors.values())

    @property
    def identity(self) -> list[Any]:
        """Changes when a file of weights is replaced."""
        stats = {path: path.stat() for path in {place.path for place in self.tensors.values()}}
        files = sorted((path.name, s.st_size, s.st_mtime_ns) for path, s in stats.items())
        return [str(self.directory.resolve()), self.config, files]

    def other_files(self) -> dict[str, bytes]:
        """What is to be copied: all that is no weight."""
        return other_files(self.directory)


def other_files(directory: Path) -> dict[str, bytes]:
    """What lies beside weights and belongs to them: configs, tokenizers, templates, licences."""
    files = (path for path in sorted(directory.iterdir()) if path.is_file())
    return {path.name: path.read_bytes() for path in files if _is_copied(path)}


def open_source(directory: Path) -> Source:
    """Reads the config and the headers, no tensor.

    Raises:
        CheckpointError: it is no checkpoint, has none in safetensors files, lacks one of them, or
            is quantised already.
    """
    config = read_config(directory)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        named = shown(method or "quantization_config")
        raise CheckpointError(
            f"{directory} is quantised already ({named}); give the checkpoint that it was made from"
        )
    return Source(directory, config, read_tensors(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    return _json(directory / "config.json", directory)


def read_tensors(directory: Path) -> dict[str, TensorPlace]:
    """Where each tensor lies, told from the headers of the files.

    Raises:
        CheckpointError: there are no safetensors files, or one is missing, damaged or cut short.
    """
    tensors: dict[str, TensorPlace] = {}
    for path in _files(directory):
        tensors |= read_header(path)
    if (directory / _INDEX).is_file() and not (directory / _SINGLE).is_file():
        _check_index(directory / _INDEX, tensors)
    return tensors


def _files(directory: Path) -> list[Path]:
    """The files of weights, as `from_pretrained` finds them."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if (directory / _INDEX).is_file():
        names = sorted(set(_weight_map(directory / _INDEX).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {', '.join(missing)}, which {_INDEX} names; download them"
            )
        return [directory / name for name in names]
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(
            f"{directory} has its weights in pickles ({pickled[0]}), which may run any code and "
            "are never opened; convert them: from_pretrained(...).save_pretrained(new_directory)"
        )
    raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    found = _json(path, path.parent).get("weight_map")
    if not isinstance(found, dict) or not all(_is_plain(file) for file in found.values()):
        raise CheckpointError(f"{path} has no weight_map of files beside it; download it again")
    for name in {*found, *found.values()}:
        check_name(name, f"{path}: weight_map")
    return found


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file and file != ".."


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
            f"{directory} has no {path.name}: it is no checkpoint of Hugging Face; give a local "
            "directory that save_pretrained wrote or that was downloaded"
        )
    return read_json(path)


def _is_copied(path: Path) -> bool:
    if path.name.endswith(".index.json") or path.name.startswith("fqcompile."):
        return False
    return path.suffix in _COPIED or path.name.startswith(_LICENCES)


def will_read(places: list[TensorPlace]) -> None:
    """Ask the system to fetch these meanwhile, into its own cache, where it takes such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for place in places:
        descriptor = os.open(place.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, place.start, place.nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
