"""The page: whole without a network, all text escaped, a row for each row."""

import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from fqcompile.report import Plan
from fqcompile.report.html import Cell, Table, render_page
from fqcompile.report.table import site_page_table

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and cell texts, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr" and "tbody" in self.open:
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data


def test_page_shows_every_cell_of_every_site(plan: Plan) -> None:
    table = site_page_table(plan.sites)
    page = Page(render_page("t", [], [table]))
    assert page.rows == [[cell.text for cell in row] for row in table.rows]
    assert page.tags.count("th") == len(table.headers)


def test_page_refers_to_nothing_outside(plan: Plan) -> None:
    text = render_page("t", [str(plan.totals)], [site_page_table(plan.sites)])
    page = Page(text)
    assert not {"link", "img", "iframe", "base", "object"} & set(page.tags)
    assert not {"src", "href", "action", "style"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|import\(", text)


def test_page_runs_its_own_script_alone(plan: Plan) -> None:
    hostile = Table("<script>", ("<script>",), ())
    page = Page(render_page("<script>", ["<script>"], [hostile, site_page_table(plan.sites)]))
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_page_follows_the_theme_of_the_system_and_has_a_filter() -> None:
    text = render_page("t", [], [])
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    assert ("type", "search") in Page(text).attributes


def test_numbers_carry_what_they_sort_by() -> None:
    table = Table("t", ("size",), ((Cell("1,024.00", 1024),), (Cell("none"),)))
    values = [
        value
        for name, value in Page(render_page("t", [], [table])).attributes
        if name == "data-value"
    ]
    assert values == ["1024"]


PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["C"]))


@given(st.lists(st.lists(PRINTABLE, min_size=2, max_size=2), max_size=4), PRINTABLE)
def test_any_text_comes_out_as_it_went_in(rows: list[list[str]], note: str) -> None:
    table = Table(note, ("a", note), tuple(tuple(map(Cell, row)) for row in rows))
    assert Page(render_page(note, [note], [table])).rows == rows
