"""A directory that holds the old save or the new one, whenever its writer is killed.

    1  shards of a new generation, other files beside the old ones     the old save is whole
    2  the manifest, by one rename                                     the new save is whole
    3  other files by a rename each; what no manifest names is removed

Whoever writes next finishes step 3, or undoes step 1, of one that did not get so far.
"""

import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os.path import realpath, samestat
from pathlib import Path

from fqcompile import locks
from fqcompile.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from fqcompile.errors import CheckpointError
from fqcompile.files.replace import remove, rename, sync_directory, write_file

LOCK = ".fqcompile.lock"

_SHARD = re.compile(r"fqcompile-([0-9a-f]{8})-\d{5}\.safetensors")
_RECORD = re.compile(r"fqcompile\.(json|journal)")
_STAGED = re.compile(r"(.+)\.fqcompile-([0-9a-f]{8})")


class NotWritten(CheckpointError):
    """The system does not let it be written; what is there stays, to go on from."""


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Whatever the system refuses meanwhile names the directory, and what to do.

    Raises:
        NotWritten: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise NotWritten(
            f"{directory} cannot be written ({error}); give a directory that can be made and that "
            "you can write to, on a disk with room"
        ) from error


def make_directory(directory: Path) -> None:
    """With all that leads to it; where it is a link, what that leads to.

    Raises:
        OSError: there can be none.
    """
    Path(realpath(directory)).mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One writer at a time; the system releases the lock of a process that dies.

    Its file is there meanwhile alone: what is written becomes a directory that others read.

    Raises:
        CheckpointError: another writer holds it, or the system has no such locks.
    """
    if sys.platform == "win32":
        raise CheckpointError("writing a checkpoint needs the file locks of Linux or macOS")
    path = directory / LOCK
    with ExitStack() as held:
        try:
            descriptor = held.enter_context(locks.locked(path, seconds=0.0))
            # Whoever held it before may have removed the file between its opening and its lock.
            if not samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError
        except (TimeoutError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{directory} is being written by another process; wait for it, or choose another "
                "directory"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def new_generation() -> str:
    """A tag that no other save has."""
    return secrets.token_hex(4)


def staged(directory: Path, file: str, generation: str) -> Path:
    """Where a file waits for the manifest."""
    return directory / f"{file}.fqcompile-{generation}"


@contextmanager
def writing(directory: Path, keep: str | None = None) -> Iterator[None]:
    """The directory for one writer alone, rid of what others left; `keep` is a generation to keep.

    Raises:
        CheckpointError: it is a file, another process writes to it, or it cannot be written.
    """
    with writing_to(directory):
        if directory.exists() and not directory.is_dir():
            raise CheckpointError(f"{directory} is a file; give a directory to write to")
        make_directory(directory)
        with _tidied(directory, keep):
            yield


@contextmanager
def _tidied(directory: Path, keep: str | None) -> Iterator[None]:
    with locked(directory):
        _tidy(directory, readable_manifest(directory), keep)
        try:
            yield
        except BaseException:
            _tidy(directory, readable_manifest(directory), keep)
            raise


def readable_manifest(directory: Path) -> Manifest | None:
    """That of a directory, or None where there is none or it is unreadable."""
    try:
        return read_manifest(directory)
    except CheckpointError:
        return None


def check_not_replaced(directory: Path, files: Mapping[str, bytes], remedy: str) -> None:
    """Whether these can be written without a file that no save wrote being lost.

    Raises:
        CheckpointError: one is there, and is another; `remedy` says what to do.
    """
    before = readable_manifest(directory)
    if before is None and (directory / MANIFEST).exists():
        return  # a save of ours that was damaged
    own = before.files if before else ()
    for name, content in files.items():
        path = directory / name
        if name not in own and path.is_file() and path.read_bytes() != content:
            raise CheckpointError(
                f"{path} would be replaced, and no save of fqcompile has written it; {remedy}"
            )


def stage(directory: Path, generation: str, files: Mapping[str, bytes]) -> None:
    """Files to appear under their names when the manifest does; those that are there stay."""
    for name, content in files.items():
        path = directory / name
        if not path.is_file() or path.read_bytes() != content:
            write_file(staged(directory, name, generation), [content])


def commit(directory: Path, manifest: Manifest) -> None:
    """The moment when the new save takes the place of the old."""
    path = staged(directory, MANIFEST, manifest.generation)
    write_file(path, [manifest.to_json().encode()])
    sync_directory(directory)
    rename(path, directory / MANIFEST)
    sync_directory(directory)
    _tidy(directory, manifest, None)


def file_of(directory: Path, manifest: Manifest, name: str) -> Path:
    """Where one of `manifest.files` lies, even if its writer was killed in step 3."""
    path = staged(directory, name, manifest.generation)
    return path if path.is_file() else directory / name


def remove_save(directory: Path) -> None:
    """All that saves wrote there, and the directory itself where nothing else is in it."""
    manifest = readable_manifest(directory)
    files = manifest.files if manifest else ()
    (directory / MANIFEST).unlink(missing_ok=True)  # first: it vouches for the rest
    for path in list(directory.iterdir()):
        kinds = (_RECORD, _SHARD, _STAGED)
        if path.name in files or any(kind.fullmatch(path.name) for kind in kinds):
            path.unlink()
    if not any(directory.iterdir()):
        directory.rmdir()


def _tidy(directory: Path, manifest: Manifest | None, keep: str | None) -> None:
    """Finish what the manifest promises, and remove what neither it nor `keep` names.

    Without a readable manifest nobody knows what is whose: all shards stay.
    """
    if manifest is None and (directory / MANIFEST).exists():
        return
    generation = None if manifest is None else manifest.generation
    for path in sorted(directory.iterdir()):
        shard, waiting = _SHARD.fullmatch(path.name), _STAGED.fullmatch(path.name)
        if waiting and manifest and waiting[2] == generation and waiting[1] in manifest.files:
            rename(path, directory / waiting[1])
        elif (waiting and waiting[2] != keep) or (shard and shard[1] not in (generation, keep)):
            remove(path)
    sync_directory(directory)
