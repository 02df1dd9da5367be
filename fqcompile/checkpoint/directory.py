"""Atomic replacement of a save: if the writer is killed, the old or the new save is complete.

    1  write the shards and other files of a new generation   the old save is valid
    2  rename the manifest                                    the new save is valid
    3  rename the other files; delete files of no manifest

If a writer was killed, the next one completes its step 3 or undoes its step 1.
"""

import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from os.path import realpath, samestat
from pathlib import Path

from fqcompile import locks
from fqcompile.checkpoint.manifest import (
    GENERATION,
    MANIFEST,
    SHARD,
    SHARD_FILE,
    Manifest,
    read_manifest,
)
from fqcompile.checkpoint.source import INDEX, SINGLE
from fqcompile.errors import CheckpointError
from fqcompile.files.trusted import remove, rename, sync_directory, write_file

LOCK = ".fqcompile.lock"

_RECORD = re.compile(r"fqcompile\.(json|journal)")
_STAGED = re.compile(rf"(.+)\.fqcompile-({GENERATION.pattern})")


class NotWritten(CheckpointError):
    """The directory cannot be written; its contents stay, so that a run can resume."""


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Turn an OSError raised inside into an error that names the directory and the remedy.

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
    """Create the directory and its parents; for a link, the directory it points to.

    Raises:
        OSError: it cannot be created.
    """
    Path(realpath(directory)).mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Allow one writer at a time; the system releases the lock of a process that dies.

    The lock file is deleted afterwards, so that it is not part of the saved directory.

    Raises:
        CheckpointError: another writer holds the lock, or the system has no file locks.
    """
    if sys.platform == "win32":
        raise CheckpointError("writing a checkpoint needs the file locks of Linux or macOS")
    path = directory / LOCK
    with ExitStack() as held:
        try:
            descriptor = held.enter_context(locks.locked(path, seconds=0.0))
            # The previous holder may have removed the file between our open and our lock.
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
    """A tag that is unique to a save."""
    return secrets.token_hex(4)


def staged(directory: Path, file: str, generation: str) -> Path:
    """The temporary path of a file until the manifest is written."""
    return directory / f"{file}.fqcompile-{generation}"


@contextmanager
def writing(directory: Path, keep: str | None = None) -> Iterator[None]:
    """Lock the directory and remove leftovers of killed writers, except the generation `keep`.

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
    """The manifest of a directory, or None if it is missing or unreadable."""
    try:
        return read_manifest(directory)
    except CheckpointError:
        return None


def check_not_replaced(directory: Path, files: Mapping[str, bytes], remedy: str) -> None:
    """Check that writing these files would not overwrite a file that no save wrote.

    Raises:
        CheckpointError: a different file of that name exists; `remedy` says what to do.
    """
    if INDEX in files and (directory / SINGLE).exists():
        raise CheckpointError(
            f"{directory / SINGLE} is there, which from_pretrained would open instead of what is "
            f"to be saved beside it; {remedy}"
        )
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
    """Write files under temporary names, to be renamed when the manifest is published."""
    for name, content in files.items():
        path = directory / name
        if not path.is_file() or path.read_bytes() != content:
            write_file(staged(directory, name, generation), [content])


def commit(directory: Path, manifest: Manifest) -> None:
    """Publish the new save: rename its manifest over the old one."""
    path = staged(directory, MANIFEST, manifest.generation)
    write_file(path, [manifest.to_json().encode()])
    sync_directory(directory)
    rename(path, directory / MANIFEST)
    sync_directory(directory)
    _tidy(directory, manifest, None)


def file_of(directory: Path, manifest: Manifest, name: str) -> Path:
    """The path of one of `manifest.files`, even if its writer was killed in step 3."""
    path = staged(directory, name, manifest.generation)
    return path if path.is_file() else directory / name


def check_not_written_over(directory: Path, manifest: Manifest) -> None:
    """Check that the save is still what `from_pretrained` opens: `save_pretrained` writes files of
    its own beside it, and leaves the manifest and the old shards.

    Raises:
        CheckpointError: another program has written a model there since.
    """
    if INDEX not in manifest.files:
        return
    found = (directory / SINGLE).exists()
    with suppress(FileNotFoundError):  # or renamed by a writer, who then has a newer manifest
        found = found or file_of(directory, manifest, INDEX).read_bytes() != manifest.index()
    if found:
        raise CheckpointError(
            f"{directory} holds two models: since fqcompile wrote {MANIFEST}, another program has "
            "written its own files beside it, such as save_pretrained. To keep the newer one, "
            f"remove {MANIFEST} and the {SHARD}* files; to keep the older one, remove the others"
        )


def remove_save(directory: Path) -> None:
    """Delete all files that saves wrote there, and the directory if it is then empty."""
    manifest = readable_manifest(directory)
    files = manifest.files if manifest else ()
    (directory / MANIFEST).unlink(missing_ok=True)  # first: without it no file counts
    for path in list(directory.iterdir()):
        kinds = (_RECORD, SHARD_FILE, _STAGED)
        if path.name in files or any(kind.fullmatch(path.name) for kind in kinds):
            path.unlink()
    if not any(directory.iterdir()):
        directory.rmdir()


def _tidy(directory: Path, manifest: Manifest | None, keep: str | None) -> None:
    """Complete step 3 of the manifest, and delete shards that neither it nor `keep` names.

    Without a readable manifest the owner of a shard is unknown, so all shards stay.
    """
    if manifest is None and (directory / MANIFEST).exists():
        return
    generation = None if manifest is None else manifest.generation
    for path in sorted(directory.iterdir()):
        shard, waiting = SHARD_FILE.fullmatch(path.name), _STAGED.fullmatch(path.name)
        if waiting and manifest and waiting[2] == generation and waiting[1] in manifest.files:
            rename(path, directory / waiting[1])
        elif (waiting and waiting[2] != keep) or (shard and shard[1] not in (generation, keep)):
            remove(path)
    sync_directory(directory)
