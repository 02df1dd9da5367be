"""The dump of a report: its files, and the same as artifacts of the structured trace."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fqcompile.report import CompileReport, dump_report, trace_report

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
