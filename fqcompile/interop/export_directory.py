"""Write a checkpoint atomically, by one rename, and resume after a kill.

OUT.partial/export.json                      identifies the export
OUT.partial/model-00001-of-00009.safetensors  complete: written under another name, then renamed
OUT.partial  ->  OUT                         when all files are complete
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fqcompile.checkpoint.directory import (
    LOCK,
    NotWritten,
    locked,
    make_directory,
    remove_save,
    writing_to,
)
from fqcompile.checkpoint.source import INDEX, SINGLE
from fqcompile.errors import CheckpointError, FineQuantError
from fqcompile.files.safetensors_file import bytes_of, consecutive, encode_header
from fqcompile.files.trusted import remove, replace_durably, sync_directory, write_file
from fqcompile.files.untrusted import parse_json, shown
from fqcompile.interop.export_blocks import Block

SHARD_BYTES = 4 << 30
_IDENTITY, _TEMPORARY = "export.json", "unfinished.tmp"
_SHARD = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors")
QUANTIZED = "quantized"  # a checkpoint of Hugging Face on its way


class _NotOurs(CheckpointError):
    """A foreign file exists where this export would write; nothing is changed."""


def real_path(out: Path) -> Path:
    """The output path with links resolved, so that one rename creates the target directory."""
    return Path(os.path.realpath(out))


def partial_directory(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def check_free(out: Path, resume: bool) -> None:
    """Check that the export may write to these paths.

    Raises:
        CheckpointError: the output exists, or cannot be created.
    """
    with writing_to(out):
        _check_free(out, resume)


def _check_free(out: Path, resume: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; give another directory, or remove it")
    partial = partial_directory(out)
    _check_own(partial)
    if partial.exists() and not resume:
        raise CheckpointError(
            f"{partial} holds an unfinished export; give resume=True (--resume) to go on with it, "
            "or remove it"
        )


def _check_own(partial: Path) -> None:
    """Refuse a directory without our journal: its files may belong to someone else."""
    if partial.is_symlink():  # it, not what it leads to, would become OUT
        raise CheckpointError(f"{partial} is a link, and exports are written there; rename it")
    if not partial.exists():
        return
    if not partial.is_dir():
        raise CheckpointError(f"{partial} is a file, and exports are written there; rename it")
    names = {path.name for path in partial.iterdir()} - {_TEMPORARY, LOCK}
    if names and _IDENTITY not in names:
        raise CheckpointError(
            f"{partial} holds {shown(min(names))} and no {_IDENTITY}, so no export has written it; "
            "give another OUT, or rename that directory"
        )


@contextmanager
def exporting(out: Path, identity: str) -> Iterator[Path]:
    """Lock and return the directory to write to; it is renamed to `out` at the end.

    Raises:
        CheckpointError: it holds an unfinished different export, another process writes to it, or
            it cannot be written.
    """
    partial = partial_directory(out)
    with writing_to(out), _finishing(out, partial, identity):
        yield partial


@contextmanager
def _finishing(out: Path, partial: Path, identity: str) -> Iterator[None]:
    make_directory(partial)
    with locked(partial):
        _check_own(partial)
        path = partial / _IDENTITY
        if path.is_file() and _identity(path) != identity:
            raise CheckpointError(
                f"{partial} is of another export: another source, or other options; repeat those "
                "to resume it, or remove it"
            )
        # Before anything that it vouches for.
        replace_durably(path, [json.dumps(identity).encode()], partial / _TEMPORARY)
        try:
            yield
        except (_NotOurs, NotWritten):
            raise
        except FineQuantError:
            _remove_own(partial)  # going on would end the same
            raise
        sync_directory(partial)
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
        sync_directory(out.parent)
        remove(out / LOCK)  # it went with the directory
        remove(out / _IDENTITY)  # not before: shards of nobody knows what must not be taken up


def _identity(path: Path) -> Any:
    return parse_json(path.read_bytes(), str(path), "remove the directory that it is in")


def _remove_own(partial: Path) -> None:
    """Delete the files that this export wrote; all others stay."""
    for path in partial.iterdir():
        if path.name == QUANTIZED:
            remove_save(path)
        elif path.name in (_TEMPORARY, INDEX, "config.json") or _SHARD.fullmatch(path.name):
            remove(path)
    if {path.name for path in partial.iterdir()} <= {_IDENTITY, LOCK}:
        remove(partial / _IDENTITY)
        remove(partial / LOCK)
        partial.rmdir()


def write_checkpoint(directory: Path, blocks: Sequence[Block], files: dict[str, bytes]) -> None:
    """Write the shards, their index and the other files; existing complete shards are kept."""
    shards = _shards(blocks)
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    total = sum(block.nbytes for block in blocks)
    label = "fqcompile: exporting"
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as progress:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(directory, name, shard, progress)
    for name, content in files.items():
        write_file(directory / name, [content])
    if len(shards) > 1:
        where = {
            t: n for n, shard in zip(names, shards, strict=True) for b in shard for t in b.tensors
        }
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(directory / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode()])


def _shards(blocks: Sequence[Block]) -> list[list[Block]]:
    shards: list[list[Block]] = [[]]
    size = 0
    for block in blocks:
        if shards[-1] and size + block.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(block)
        size += block.nbytes
    return shards


def _shard_name(index: int, count: int) -> str:
    if count == 1:
        return SINGLE
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(directory: Path, name: str, blocks: Sequence[Block], progress: tqdm) -> None:  # type: ignore[type-arg]
    forms = {name: form for block in blocks for name, form in block.tensors.items()}
    header = encode_header(consecutive(forms))
    size = sum(block.nbytes for block in blocks)
    path = directory / name
    if path.is_file():  # it got its name when it was on the disk
        _check_shard(path, header, len(header) + size)
        progress.update(size)
        return
    replace_durably(path, _pieces(header, blocks, progress), directory / _TEMPORARY)


def _check_shard(path: Path, header: bytes, size: int) -> None:
    with open(path, "rb") as file:
        same = path.stat().st_size == size and file.read(len(header)) == header
    if not same:
        raise _NotOurs(
            f"{path} is not what this export has written: its size or its header is another; "
            "move it elsewhere to go on"
        )


def _pieces(
    header: bytes,
    blocks: Sequence[Block],
    progress: tqdm,  # type: ignore[type-arg]
) -> Iterator[bytes | memoryview]:
    yield header
    for block in blocks:
        for value in block.make():
            yield bytes_of(value.contiguous())
        progress.update(block.nbytes)
        block.release()
