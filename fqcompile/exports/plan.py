"""The plan of an export: what became of each weight in the checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fqcompile.checkpoint.stream_writer import site_from
from fqcompile.config import HEAD_NAMES
from fqcompile.errors import UnquantizableWeight
from fqcompile.exports.blocks import packed_bytes
from fqcompile.exports.harmonise import HEADS_STAY, Choice
from fqcompile.exports.layout import Layout, Piece
from fqcompile.exports.saved import Saved
from fqcompile.report import Plan, Site

# What quantising says of heads that an export has told it to leave.
_HEADS_EXCLUDED = f"name matches exclude pattern {HEAD_NAMES.pattern!r}"


def export_plan(saved: Saved, layout: Layout, choices: Mapping[str, Choice]) -> Plan:
    """That of the saved model, with what became of each weight in the checkpoint."""
    pieces: dict[str, list[Piece]] = {}
    for piece in layout.pieces:
        pieces.setdefault(piece.source, []).append(piece)
    sites = []
    for site in map(site_from, saved.manifest.sites):
        own = pieces.get(site.name, [])
        reason = layout.reasons.get(site.name) or next(
            (r for piece in own if (r := choices[piece.name].reason)), None
        )
        if site.reason == _HEADS_EXCLUDED:
            site = replace(site, reason=HEADS_STAY)
        if site.status == "quantized":
            site = _kept(site, reason) if reason else _packed(site, own, choices)
        sites.append(site)
    return Plan(tuple(sites), saved.manifest.options)


def _kept(site: Site, reason: str) -> Site:
    return replace(
        site, status="kept", reason=f"written dense, as its int{site.bits} codes say: {reason}",
        bits=None, group_size=None, bytes_after=site.bytes_before, relative_error=None,
        expert_errors=None,
    )  # fmt: skip


def _packed(site: Site, pieces: Sequence[Piece], choices: Mapping[str, Choice]) -> Site:
    scheme = choices[pieces[0].name].scheme
    assert scheme is not None
    nbytes = sum(packed_bytes(piece, scheme) for piece in pieces)
    size = pieces[0].k if scheme.group_size is None else scheme.group_size
    return replace(site, bits=scheme.bits, group_size=size, bytes_after=nbytes)


def check_unsupported(plan: Plan, saved: Saved) -> None:
    """Raise UnquantizableWeight for the first packed weight that is written dense."""
    packed = {row["name"] for row in saved.manifest.sites if row["status"] == "quantized"}
    for site in plan.kept:
        if site.name in packed:
            raise UnquantizableWeight(f"{site.name}: {site.reason}")
