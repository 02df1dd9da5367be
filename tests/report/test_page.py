"""The page: whole without a network, no script but its own, every section named."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from fqcompile.report import CompileReport, Plan
from fqcompile.report.page import Section, render_page
from fqcompile.report.site import site_page_table
from tests.report.page_parser import Page

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def text(report: CompileReport, tmp_path: Path) -> str:
    return report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_shows_every_cell_of_every_site(text: str, plan: Plan) -> None:
    table = site_page_table(plan.sites)
    assert Page(text).rows["sites"] == [[cell.text for cell in row] for row in table.rows]


def test_page_refers_to_nothing_outside(text: str) -> None:
    page = Page(text)
    assert not {"link", "img", "iframe", "base", "object"} & set(page.tags)
    assert not {"src", "action", "style"} & {name for name, _ in page.attributes}
    assert all((value or "").startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|import\(", text)


def test_page_runs_its_own_script_alone(text: str) -> None:
    page = Page(text)
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("content", policy) in page.attributes


def test_title_notes_and_facts_are_escaped() -> None:
    page = Page(render_page(HOSTILE, [HOSTILE], [(HOSTILE, HOSTILE)], [Section(HOSTILE, "")]))
    assert page.tags.count("script") == 1
    assert page.facts == {HOSTILE: HOSTILE}


def test_contents_name_every_section(text: str) -> None:
    page = Page(text)
    anchors = [value for name, value in page.attributes if name == "href"]
    ids = [f"#{value}" for name, value in page.attributes if name == "id"]
    assert anchors == [i for i in ids if not i.endswith("-title")]
    assert len(anchors) == 8


def test_page_follows_the_theme_of_the_system_and_has_a_filter(text: str) -> None:
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    assert ("type", "search") in Page(text).attributes


def test_page_of_nothing_has_its_title_and_options(tmp_path: Path) -> None:
    path = Plan((), {"bits": 4}).to_html(tmp_path / "plan.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.facts["sites quantised"] == "0 of 0"
    assert page.rows == {"options": [["bits", "4", "4"]]}


def test_page_of_kept_sites_alone_says_that_nothing_is_quantised(
    plan: Plan, tmp_path: Path
) -> None:
    text = Plan(plan.kept).to_html(tmp_path / "plan.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.facts["sites quantised"] == "0 of 2"
    assert "none: nothing is quantised" in text and "there is none, or they came packed" in text
    assert "kernels" not in page.rows and len(page.rows["sites"]) == 2
