"""The report of one graph, and the list of the reports of a process."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fqcompile.compiled import warm_up
from fqcompile.config import FineQuantConfig
from fqcompile.report import (
    CompileReport,
    PassRecord,
    Plan,
    amend,
    clear_reports,
    record,
    reports,
)
from fqcompile.report.compile_report import MOST_REPORTS
from tests.report.page_parser import Page


@pytest.fixture
def empty_list() -> Iterator[None]:
    before = reports()
    clear_reports()
    yield
    clear_reports()
    for report in before:
        record(report)


def test_text_names_graph_versions_warnings_passes_and_sites(report: CompileReport) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "graph forward/0, 1.50 s (torch 2.13.0, fqcompile 0.1)"
    assert lines[1] == "warning: weight & buffer share storage"
    assert ["rewrite", "1", "0.125"] in [line.split() for line in lines]
    assert str(report).endswith(str(report.plan))


def test_text_without_passes_has_no_table_of_them() -> None:
    plan = Plan(())
    assert str(CompileReport("g", plan)) == f"graph g, 0.00 s\n\n{plan}"


def test_json_holds_passes_without_their_graphs(report: CompileReport) -> None:
    read = json.loads(report.to_json())
    fields = {"name": "rewrite", "seconds": 0.125, "count": 1, "matched": ["linear<0>"]}
    assert read["passes"][1] == fields
    assert read["warnings"] == ["weight & buffer share storage"]
    assert read["versions"] == {"torch": "2.13.0", "fqcompile": "0.1"}
    assert read["plan"] == json.loads(report.plan.to_json())
    assert (read["graph"], read["total_seconds"]) == ("forward/0", 1.5)


def test_sites_are_those_of_the_plan(report: CompileReport) -> None:
    assert report.sites is report.plan.sites


def test_page_has_sites_and_passes(report: CompileReport, tmp_path: Path) -> None:
    text = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.rows["sites"]) == 4
    assert page.rows["passes"] == [["capture", "0", "0.250", ""], ["rewrite", "1", "0.125", ""]]
    assert page.summaries[-3:] == [
        "rewrite matched 1",
        "rewrite changed the graph: +1 −1 lines",
        "all 2 options",
    ]
    assert "linear&lt;0&gt;" in text and "weight &amp; buffer" in text
    assert '<span class="added">+    y = fqcompile_linear(x, w)</span>' in text


def test_long_lines_of_a_diff_are_cut_and_the_page_says_so(tmp_path: Path) -> None:
    record = PassRecord("fuse", 0.1, 1, (), "a = 1\n", f"b{'b' * 500} = 2\n")
    page = CompileReport("g", Plan(()), (record,)).to_html(tmp_path / "r.html").read_text("utf-8")
    assert "b" * 501 not in page and "lines cut at … are whole" in page
    assert record.diff[-1] == f"+b{'b' * 500} = 2"


def test_diff_is_text_whatever_the_graph_says(tmp_path: Path) -> None:
    record = PassRecord("fuse", 0.1, 1, ("<script>",), "a = 1\n", "<script>\n")
    report = CompileReport("g", Plan(()), (record,))
    page = Page(report.to_html(tmp_path / "r.html").read_text("utf-8"))
    assert page.tags.count("script") == 1


def test_page_says_which_options_are_unlike_the_defaults(tmp_path: Path) -> None:
    options = {**FineQuantConfig().as_dict(), "alpha": 0.8, "bits": 8}
    text = Plan((), options).to_html(tmp_path / "r.html").read_text("utf-8")
    assert "<p>unlike the defaults: bits=8, alpha=0.8</p>" in text
    assert "<p>unlike the defaults: nothing</p>" in (
        Plan((), FineQuantConfig().as_dict()).to_html(tmp_path / "r.html").read_text("utf-8")
    )


def test_pass_without_both_graphs_has_no_diff() -> None:
    assert PassRecord("capture", 0.1, 1, (), None, "a\n").diff == ()
    assert PassRecord("match", 0.1, 1, (), "a\n", "a\n").diff == ()


def test_reports_come_newest_last_and_as_a_copy(report: CompileReport, empty_list: None) -> None:
    newer = dataclasses.replace(report, graph="later")
    record(report)
    record(newer)
    reports().clear()
    assert reports() == [report, newer]
    clear_reports()
    assert reports() == []


def test_an_empty_list_is_explained(
    empty_list: None, report: CompileReport, caplog: pytest.LogCaptureFixture
) -> None:
    """What torch.compile wraps compiles its own calls alone: generate() of it compiles nothing."""
    with caplog.at_level("WARNING", "fqcompile"):
        assert reports() == []
        (warning,) = caplog.messages
        assert "generate()" in warning and "model.compile(backend='finequant')" in warning
        caplog.clear()
        record(report)
        assert reports() == [report] and not caplog.messages


def test_the_newest_reports_are_kept() -> None:
    """So is what a process of days holds; warming up still finds its own."""
    for number in range(MOST_REPORTS + 10):
        record(CompileReport(f"graph_{number}", Plan(())))
    kept = reports()
    assert [kept[0].graph, kept[-1].graph] == ["graph_10", f"graph_{MOST_REPORTS + 9}"]
    assert len(kept) == MOST_REPORTS
    made = iter(range(2))

    def compiles_twice() -> None:
        for number in made:
            record(CompileReport(f"new_{number}", Plan(())))
            break

    assert [report.graph for report in warm_up(compiles_twice)] == ["new_0", "new_1"]


def test_a_warning_that_comes_later_is_in_the_report_that_is_kept() -> None:
    reports_before = [CompileReport(name, Plan(())) for name in "ab"]
    for report in reports_before:
        record(report)
    later = amend(reports_before[0], warnings=("said later",))
    assert reports() == [later, reports_before[1]]
    assert later.warnings == ("said later",)


def test_a_checkout_that_is_not_installed_compiles_and_says_so(tmp_path: Path) -> None:
    """PYTHONPATH is all that a machine without a network needs."""
    program = """
import importlib.metadata as metadata
asked = metadata.version
def version(name):
    if name == "fqcompile":
        raise metadata.PackageNotFoundError(name)
    return asked(name)
metadata.version = version
import torch, fqcompile.backend
options = {"min_elements": 1, "inner_backend": "eager", "calibration": None}
layer = torch.nn.Linear(64, 64).requires_grad_(False)
torch.compile(layer, backend="finequant", options=options)(torch.ones(1, 64))
(report,) = fqcompile.reports()
assert report.plan.quantized
print(report.versions["fqcompile"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "not installed\n", done.stderr
