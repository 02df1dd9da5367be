"""The dump of a report: its files, and the same as artifacts of the structured trace."""

import dataclasses
import errno
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fqcompile.report import CompileReport, dump_report, trace_report
from tests.helpers import finequant

FILES = [
    "01_capture.txt",
    "02_rewrite.after.py",
    "02_rewrite.before.py",
    "02_rewrite.diff",
    "02_rewrite.txt",
    "report.html",
    "report.json",
    "sites.txt",
]


def test_dump_writes_a_folder_of_numbered_passes(report: CompileReport, tmp_path: Path) -> None:
    folder = dump_report(report, tmp_path / "dumps")
    assert folder == tmp_path / "dumps" / "forward_0"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert json.loads((folder / "report.json").read_text()) == json.loads(report.to_json())
    assert (folder / "sites.txt").read_text() == f"{report}\n"


def test_dump_of_a_pass_shows_graphs_diff_matches_and_time(
    report: CompileReport, tmp_path: Path
) -> None:
    folder = dump_report(report, tmp_path)
    assert (folder / "02_rewrite.before.py").read_text() == report.passes[1].before
    assert (folder / "02_rewrite.after.py").read_text() == report.passes[1].after
    assert (folder / "02_rewrite.txt").read_text() == (
        "rewrite: count 1, 0.125000 s\nmatched linear<0>\n"
    )
    assert (folder / "02_rewrite.diff").read_text().splitlines() == [
        "--- 02_rewrite.before.py",
        "+++ 02_rewrite.after.py",
        "@@ -1,3 +1,3 @@",
        " def forward(x, w):",
        "-    y = linear(x, w)",
        "+    y = fqcompile_linear(x, w)",
        "     return y",
    ]


def test_second_dump_replaces_the_first(report: CompileReport, tmp_path: Path) -> None:
    dump_report(report, tmp_path)
    folder = dump_report(dataclasses.replace(report, total_seconds=9.0), tmp_path)
    assert "9.00 s" in (folder / "sites.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("graph", ["../../up", "/root", "..", "a b/c:d", ""])
def test_dump_stays_below_its_folder(report: CompileReport, tmp_path: Path, graph: str) -> None:
    folder = dump_report(dataclasses.replace(report, graph=graph), tmp_path / "dumps")
    assert folder.parent == tmp_path / "dumps" and folder.resolve() == folder
    assert [path.name for path in tmp_path.iterdir()] == ["dumps"]


@pytest.mark.parametrize("name", ["file/dumps", "x" * 300, "/proc/dumps"])
def test_what_cannot_be_dumped_is_said_once(
    name: str, report: CompileReport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    for number in range(3):
        dump_report(dataclasses.replace(report, graph=f"graph_{number}"), tmp_path / name)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"debug_dir={tmp_path / name}" in said and "choose a directory" in said
    assert not list(tmp_path.rglob("*graph*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_compilation_does_not_fail_for_its_dumps(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Writing fails at any of the files; the model computes what it would without dumps."""
    writes = itertools.count()
    model = nn.Linear(128, 256).requires_grad_(False)
    x = torch.randn(3, 128)
    want = finequant(model)(x)
    real = os.open

    def refuse(path: Any, *args: Any, **named: Any) -> int:
        if tmp_path in Path(path).parents and next(writes) >= 4:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **named)

    monkeypatch.setattr(os, "open", refuse)
    torch._dynamo.reset()
    got = [finequant(model, debug_dir=str(tmp_path), alpha=alpha)(x) for alpha in (0.9, 0.8)]
    assert all(torch.equal(y, want) for y in got)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert os.strerror(code) in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4 and all(path.stat().st_size for path in written)


def test_a_graph_may_have_any_name(report: CompileReport, tmp_path: Path) -> None:
    """File systems allow 255 bytes; the end of a name tells graphs apart."""
    for letter in ("x", "\N{SNOWMAN}", "\N{MATHEMATICAL BOLD SMALL A}"):
        folders = {
            dump_report(dataclasses.replace(report, graph=f"{letter * 500}_{number}"), tmp_path)
            for number in range(2)
        }
        assert len(folders) == 2
        assert all(sorted(p.name for p in folder.iterdir()) == FILES for folder in folders)


def test_half_a_surrogate_pair_is_spelt_out(report: CompileReport, tmp_path: Path) -> None:
    """A parameter may be called so, and no dump may fail its compilation."""
    passes = (dataclasses.replace(report.passes[1], matched=("a\udc80b",)),)
    folder = dump_report(dataclasses.replace(report, passes=passes), tmp_path)
    assert "matched a\\udc80b\n" in (folder / "01_rewrite.txt").read_text(encoding="utf-8")


class Collector(logging.Handler):
    """Keeps the metadata and payload of each record of the structured trace."""

    def __init__(self) -> None:
        super().__init__()
        self.artifacts: dict[str, tuple[str, str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        metadata = getattr(record, "metadata", {}).get("artifact")
        if metadata:
            payload = getattr(record, "payload", "")
            self.artifacts[metadata["name"]] = metadata["encoding"], payload


@pytest.fixture
def trace() -> Iterator[Collector]:
    logger = logging.getLogger("torch.__trace")
    handlers, collector = list(logger.handlers), Collector()
    logger.handlers[:] = [collector]
    yield collector
    logger.handlers[:] = handlers


def test_trace_holds_the_files_of_the_dump(
    report: CompileReport, trace: Collector, tmp_path: Path
) -> None:
    trace_report(report)
    folder = dump_report(report, tmp_path)
    expected = {
        f"fqcompile_forward_0_{name.removesuffix('.json')}": (
            "json" if name.endswith(".json") else "string",
            (folder / name).read_text(),
        )
        for name in FILES
        if name != "report.html"
    }
    assert trace.artifacts == expected


def test_trace_builds_nothing_where_nobody_listens(
    report: CompileReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    monkeypatch.setattr(CompileReport, "to_json", lambda self: pytest.fail("built for nobody"))
    trace_report(report)
