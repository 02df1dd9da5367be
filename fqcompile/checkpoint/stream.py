"""quantize_checkpoint: quantize a Hugging Face checkpoint tensor by tensor, in little memory.

tensors of the source -> converters of transformers -> codes and scales -> shards -> manifest
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fqcompile.checkpoint.conversion import target_types
from fqcompile.checkpoint.data import BlockData, Data, RunsWhole, data_of
from fqcompile.checkpoint.directory import (
    check_not_replaced,
    commit,
    new_generation,
    readable_manifest,
    stage,
    writing,
    writing_to,
)
from fqcompile.checkpoint.hugging_face import config_of, hugging_face_files
from fqcompile.checkpoint.journal import Journal, Progress
from fqcompile.checkpoint.manifest import MANIFEST, Manifest, versions
from fqcompile.checkpoint.model import CheckpointModel, shortened, slots
from fqcompile.checkpoint.source import INDEX, Source, open_source, other_files
from fqcompile.checkpoint.stream_writer import StreamWriter, site_from
from fqcompile.config import FineQuantConfig, packing_config
from fqcompile.errors import CheckpointError, OptionError
from fqcompile.files.safetensors_file import TensorPlace
from fqcompile.report import Plan

log = logging.getLogger("fqcompile")


def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    calibration: Any = None,
    method: str = "scale",
    dtype: torch.dtype | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = log.info,
    **options: object,
) -> Plan:
    """Quantize a Hugging Face checkpoint into a directory that `fqcompile.load` reads.

    The result equals `quantize_` on the model that `from_pretrained` loads. Tensors are read and
    quantized one at a time (a stack of experts is one): peak memory is less than a GiB plus what
    the largest needs. Calibration adds a block and the states between blocks, GPTQ 4 GiB; a model
    that does not run block by block is loaded whole, which `say` is told.

    Args:
        source: a local directory with `config.json` and safetensors files.
        calibration, method: as for `quantize_`, or a text file, of which 128 x 512 tokens are used.
        dtype: dtype of the model; by default that of the config, else of the tensors.
        resume: continue a killed run with the same arguments; without one, start a new run.
        overwrite: replace the save in `out`, which stays valid until the new one is whole.
        say: receives lines about the rate, tensors without use, and a model that is loaded whole.
        options: those of `quantize_`.

    Raises:
        CheckpointError: the source is no such checkpoint, is quantized or pickled, or not of the
            class that its config names; `out` cannot be written; memory is too little.
        OptionError, UnquantizableWeight: as for `quantize_`.
    """
    config = packing_config({**options, "calibration": None})
    target, found = Path(out), _opened(Path(source), Path(out))
    work = CheckpointModel.of(found, dtype)
    data = data_of(found.directory, calibration=calibration, method=method)
    identity, files = _identity(work, config, data), _files(work, config)
    with writing_to(target):
        before = _before(target, identity, files, resume, overwrite)
    if isinstance(before, Plan):
        return before
    if data is None:
        return _run(work, config, target, identity, files, before, say)
    try:
        blocks = data.by_blocks(work, config)
    except RunsWhole as error:
        say(error.announced(work))
        return data.quantize(work, target, identity, files, options)
    return _run(work, config, target, identity, files, before, say, blocks)


def _opened(source: Path, target: Path) -> Source:
    if os.path.realpath(target) == os.path.realpath(source):
        raise CheckpointError(f"{target} is the checkpoint itself; give another directory")
    return open_source(source)


def _before(
    target: Path, identity: str, files: Mapping[str, bytes], resume: bool, overwrite: bool
) -> Plan | tuple[str, Progress]:
    """The plan of such a run that is finished, or how far one is that is not, or that begins.

    Raises:
        CheckpointError: `target` holds anything else that may not be replaced.
        OptionError: there are two ways to go on.
    """
    if resume and overwrite:
        raise OptionError("resume and overwrite are both given; overwrite starts anew: choose one")
    unfinished = Journal(target).read(identity) if resume else None
    if unfinished:
        return unfinished
    finished = readable_manifest(target) if resume else None
    if finished and finished.model.get("source") == identity:
        return Plan(tuple(map(site_from, finished.sites)), finished.options)
    if not overwrite:
        _check_unused(target, files, resume)
    return new_generation(), Progress()


def _run(
    work: CheckpointModel,
    config: FineQuantConfig,
    target: Path,
    identity: str,
    files: Mapping[str, bytes],
    before: tuple[str, Progress],
    say: Callable[[str], None],
    blocks: BlockData | None = None,
) -> Plan:
    generation, done = before
    journal, start = Journal(target), time.perf_counter()
    with writing(target, keep=generation):
        journal.start(identity, generation, done)
        writer = StreamWriter(work.model, config, work.given, target, journal, generation, done)
        if blocks is not None:
            blocks.write_blocks(writer)
        _write_all(work, writer)
        given = {} if blocks is None else {"calibration": blocks.data.source}
        plan = Plan(writer.sites(), config.as_dict() | given)
        manifest = _manifest(work, identity, generation, writer.done, plan, files)
        stage(target, generation, {**files, INDEX: manifest.index()})
        commit(target, manifest)
        journal.close()
    seconds = time.perf_counter() - start
    say(
        f"quantized {writer.weights / 1e6:.1f} million weights in {seconds:.1f} s: "
        f"{writer.weights / 1e6 / seconds:.1f} million a second"
    )
    if work.unused:
        say(f"left out, as {work.name} has no place for them: {shortened(work.unused)}")
    return plan


def _write_all(work: CheckpointModel, writer: StreamWriter) -> None:
    """Convert and write each step, while the system prefetches the files of the next one."""
    types = target_types(work.model, work.dtype)
    places = [[work.source.tensors[name] for name in step.names] for step in work.steps]
    label = "fqcompile: quantizing"
    with tqdm(total=work.source.nbytes, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for i, step in enumerate(work.steps):
            if not all(map(writer.wrote, step.targets)):
                _will_read(places[i + 1] if i + 1 < len(places) else [])
                results = work.convert(step, types(step.target))
                while results:  # frees each tensor once it is written
                    name = next(iter(results))
                    writer.write(name, results.pop(name))
            bar.update(sum(place.nbytes for place in places[i]))
    _write_the_rest(work, writer)
    writer.flush()


def _will_read(places: list[TensorPlace]) -> None:
    """Ask the system to prefetch these into the page cache, if it supports such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for place in places:
        descriptor = os.open(place.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, place.start, place.nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _write_the_rest(work: CheckpointModel, writer: StreamWriter) -> None:
    """Write tensors that the model computes; refuse a model with others that are in no file."""
    places = list(slots(work.computed))
    for slot in places:
        if not slot.tensor.is_meta:
            writer.write(slot.name, slot.tensor)
    lost = [slot.name for slot in places if not writer.wrote(slot.name)]
    if lost:
        raise CheckpointError(
            f"{work.name} computes {shortened(lost)} in its constructor, which no checkpoint "
            "holds; load the model and use fqcompile.quantize_ and fqcompile.save"
        )


def _manifest(
    work: CheckpointModel,
    identity: str,
    generation: str,
    done: Progress,
    plan: Plan,
    files: Mapping[str, bytes],
) -> Manifest:
    return Manifest(
        generation=generation,
        versions=versions(),
        model={"class": work.name, "config": config_of(files), "source": identity},
        options=dict(plan.options),
        sites=tuple(site.as_dict() for site in plan.sites),
        shards=done.shards,
        tensors=done.tensors,
        packed=done.packed,
        slots=done.slots,
        files=tuple(files),
    )


def _files(work: CheckpointModel, config: FineQuantConfig) -> dict[str, bytes]:
    """The files that are written next to the shards; the index is empty until these are known."""
    own = hugging_face_files(work.model, config.as_dict())["config.json"]
    return {**other_files(work.source.directory), "config.json": own, INDEX: b""}


def _identity(work: CheckpointModel, config: FineQuantConfig, data: Data | None) -> str:
    """A value that is equal for runs with equal output."""
    parts = [work.source.identity, str(work.dtype), config.as_dict(), versions()]
    if data is not None:
        parts.append(data.digest)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_unused(target: Path, files: Mapping[str, bytes], resume: bool) -> None:
    remedy = "give overwrite=True (--overwrite) to replace it, or another directory"
    if (target / MANIFEST).exists():
        raise CheckpointError(f"{target} holds a quantized model; {remedy}")
    check_not_replaced(target, files, remedy)
    if Journal(target).path.exists() and not resume:
        raise CheckpointError(
            f"{target} holds an unfinished run; give resume=True (--resume) to go on with it, or "
            "overwrite=True (--overwrite) to start anew"
        )
