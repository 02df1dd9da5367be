"""export: write a quantized model as a checkpoint that vLLM, SGLang and transformers load."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fqcompile.checkpoint.directory import remove_save
from fqcompile.checkpoint.hugging_face import without_code
from fqcompile.checkpoint.save import save
from fqcompile.checkpoint.source import other_files
from fqcompile.checkpoint.stream import quantize_checkpoint
from fqcompile.checkpoint.stream_writer import site_from
from fqcompile.config import HEAD_NAMES, excluded_by
from fqcompile.errors import CheckpointError, UnquantizableWeight
from fqcompile.interop.check import find_problems
from fqcompile.interop.export_blocks import (
    HEADS_STAY,
    Choice,
    blocks,
    harmonize,
    layers,
    packed_bytes,
)
from fqcompile.interop.export_config import model_config, quantization_config
from fqcompile.interop.export_contents import Contents, Piece, Saved, contents_of
from fqcompile.interop.export_directory import (
    QUANTIZED,
    check_free,
    exporting,
    real_path,
    write_checkpoint,
)
from fqcompile.interop.export_request import PROFILES, Request
from fqcompile.interop.layers import Layer, Scheme, is_embedding, stack_of
from fqcompile.interop.load import load
from fqcompile.report import Plan, Site
from fqcompile.report.site import format_status

log = logging.getLogger("fqcompile")


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "compressed-tensors",
    profile: str = "portable",
    tp: int = 1,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    say: Callable[[str], None] = log.info,
    **options: object,
) -> Plan:
    """Write a quantized model as a compressed-tensors checkpoint, codes unchanged.

    Scales are repeated to group sizes that the engines have kernels for, and layers that an engine
    fuses into one tensor get one scheme. Weights that cannot be packed there (output heads, tables,
    [K, N] matrices, unusual group sizes) are written dense, with their dequantized values; the
    plan gives the reason. Tensors are written one at a time, and `out` appears atomically.

    Args:
        source: a directory of `fqcompile.save` or `fqcompile quantize`; one of `save_pretrained`
            with packed weights, which must fit into memory; or a Hugging Face checkpoint, which is
            quantized first, except for output heads.
        out: a directory that does not exist or is empty, or a link to one.
        profile: "portable" (vLLM, SGLang, transformers: one scheme for all experts) or "serve"
            (vLLM, SGLang: one scheme for the experts of each layer).
        tp: the highest degree of tensor parallelism for serving: no group crosses devices.
        resume: continue a killed export with the same arguments.
        dtype, options: as for `quantize_checkpoint`; for a quantized source only `on_unsupported`,
            which with "error" raises if a weight would be written dense.

    Returns:
        The plan: the packed weights, with the bits and group sizes that were written.

    Raises:
        CheckpointError: the source is none of these, `out` exists or cannot be written, or an
            engine of the profile could not load the result; layers and remedies are named.
        OptionError, UnquantizableWeight: as for `quantize_`.
    """
    request, target = Request(Path(source), to, profile, tp, dtype, options), real_path(Path(out))
    check_free(target, resume)
    with exporting(target, request.identity()) as directory:
        plan = _export(request, directory, say)
    say(f"exported {out}: {plan.totals}")
    return plan


def _export(request: Request, directory: Path, say: Callable[[str], None]) -> Plan:
    if request.is_saved:
        return _write(Saved.open(request.source), directory, request)
    quantized = directory / QUANTIZED
    if request.is_packed:
        save(load(None, request.source), quantized)
    else:
        own: Any = request.quantizing
        quantize_checkpoint(
            request.source, quantized, dtype=request.dtype, resume=True, say=say, **own
        )
        say(f"{request.to} has uniform levels alone: weights of 4 bits were quantized to these")
    plan = _write(Saved.open(quantized), directory, request)
    remove_save(quantized)
    return plan


def _write(saved: Saved, directory: Path, request: Request) -> Plan:
    contents = contents_of(saved)
    dense = _dense_layers(contents)
    choices = harmonize(saved, contents.pieces, dense, request.profile, request.tp)
    plan = _plan_of(saved, contents, choices)
    if request.config.on_unsupported == "error":
        _check_unsupported(plan, saved)
    schemes = {name: c.scheme for name, c in choices.items() if c.scheme is not None}
    if not schemes:
        lines = "\n".join(plan.kept_lines())
        raise CheckpointError(f"nothing of {request.source} can be exported:\n{lines}")
    config = _config(saved, contents, schemes, dense)
    _check_loads(config, layers(contents, choices, dense), request, plan)
    content = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    files = {**other_files(request.source), "config.json": content}
    write_checkpoint(directory, list(blocks(saved, contents, choices)), files)
    return plan


def _dense_layers(contents: Contents) -> dict[str, Layer]:
    """Names of the checkpoint's layers that are dense in the saved model too."""
    found = {}
    for whole in contents.wholes:
        for name, (_, shape) in whole.tensors.items():
            module, _, parameter = name.rpartition(".")
            if parameter == "weight" and len(shape) == 2 and not is_embedding(module):
                found[module] = Layer(module, *shape)
    return found


def _config(
    saved: Saved, contents: Contents, schemes: Mapping[str, Scheme], dense: Mapping[str, Layer]
) -> dict[str, Any]:
    heads = {_module(name) for name in saved.tied}
    dense_pieces = (p.name for p in contents.pieces if p.name not in schemes)
    kept = {*dense, *dense_pieces, *heads, *contents.dense_stacks}
    aliases = {p.name: _module(p.source) for p in contents.pieces if stack_of(p.name) is None}
    quantization = quantization_config(schemes, kept, aliases)
    own = without_code(saved.manifest.model["config"])
    return model_config(own, quantization, saved.dtype, saved.untied)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _check_loads(
    config: Mapping[str, Any], found: list[Layer], request: Request, plan: Plan
) -> None:
    problems = [
        finding
        for engine in PROFILES[request.profile]
        for finding in find_problems(config, found, engine, tp=request.tp)
        if not finding.loads
    ]
    if problems:
        lines = [*map(str, problems), *plan.kept_lines()]
        raise CheckpointError(
            f"profile {request.profile!r} promises what these engines would not load:\n"
            + "\n".join(lines)
        )


# The skip reason of output heads that the export excluded.
_HEADS_EXCLUDED = excluded_by(HEAD_NAMES.pattern)


def _plan_of(saved: Saved, contents: Contents, choices: Mapping[str, Choice]) -> Plan:
    """The plan of the saved model, updated with the form of each weight in the checkpoint.

    Values tell which piece is whose: what a head and a table share has the name of either.
    """
    pieces: dict[str, list[Piece]] = {}
    for piece in contents.pieces:
        pieces.setdefault(piece.value, []).append(piece)
    sites, slots = [], saved.manifest.slots
    for site in map(site_from, saved.manifest.sites):
        value = slots[site.name].value if site.name in slots else ""
        own = pieces.get(value, [])
        reason = contents.reasons.get(value) or next(
            (r for piece in own if (r := choices[piece.name].reason)), None
        )
        if site.reason == _HEADS_EXCLUDED:
            site = replace(site, reason=HEADS_STAY)
        if site.status == "quantized":
            site = _kept_site(site, reason) if reason else _packed_site(site, own, choices)
        sites.append(site)
    return Plan(tuple(sites), saved.manifest.options)


def _kept_site(site: Site, reason: str) -> Site:
    return replace(
        site, status="kept",
        reason=f"written dense, as its {format_status(site)} codes say: {reason}",
        bits=None, levels=None, group_size=None, bytes_after=site.bytes_before, relative_error=None,
        expert_errors=None,
    )  # fmt: skip


def _packed_site(site: Site, pieces: Sequence[Piece], choices: Mapping[str, Choice]) -> Site:
    scheme = choices[pieces[0].name].scheme
    assert scheme is not None
    nbytes = sum(packed_bytes(piece, scheme) for piece in pieces)
    size = pieces[0].k if scheme.group_size is None else scheme.group_size
    return replace(site, bits=scheme.bits, group_size=size, bytes_after=nbytes)


def _check_unsupported(plan: Plan, saved: Saved) -> None:
    """Raise UnquantizableWeight for the first packed weight that is written dense."""
    packed = {row["name"] for row in saved.manifest.sites if row["status"] == "quantized"}
    for site in plan.kept:
        if site.name in packed:
            raise UnquantizableWeight(f"{site.name}: {site.reason}")
