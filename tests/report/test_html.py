"""Pieces of a page: all text escaped, a row for each row, numbers to sort by."""

from hypothesis import given
from hypothesis import strategies as st

from fqcompile.report.page import Cell, Table, details, filter_button, table_html, unordered
from tests.report.page_parser import Page

PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["C"]))


def test_numbers_carry_what_they_sort_by() -> None:
    table = Table("t", ("size",), ((Cell("1,024.00", 1024),), (Cell("none"),)))
    attributes = Page(table_html(table)).attributes
    assert [value for name, value in attributes if name == "data-value"] == ["1024"]


def test_column_of_numbers_has_its_header_on_their_side() -> None:
    table = Table("t", ("name", "size"), ((Cell("a"), Cell("1", 1.0)),))
    assert table_html(table).count('class="number"') == 2
    bars = Table("t", ("size",), ((Cell("", 1.0, shares=(1.0, 0.5)),),))
    assert 'class="number"' not in table_html(bars)


def test_bars_are_fractions_of_the_width_and_stay_inside() -> None:
    table = Table("t", ("size",), ((Cell("", 1.0, shares=(0.5, 1 / 3, 7.0)),),))
    widths = [value for name, value in Page(table_html(table)).attributes if name == "width"]
    assert widths == ["50.00%", "33.33%", "100.00%"]


@given(st.lists(st.lists(PRINTABLE, min_size=2, max_size=2), max_size=4), PRINTABLE)
def test_any_text_comes_out_as_it_went_in(rows: list[list[str]], note: str) -> None:
    table = Table(note, ("a", note), tuple(tuple(map(Cell, row)) for row in rows))
    page = Page(table_html(table))
    assert page.rows.get("", []) == rows
    assert ("aria-label", note) in page.attributes


@given(PRINTABLE, PRINTABLE)
def test_buttons_lists_and_summaries_hold_their_text_unchanged(text: str, query: str) -> None:
    page = Page(filter_button(text, query, text) + details(text, unordered([text, query])))
    assert ("data-query", query) in page.attributes
    assert page.summaries == ([text] if text else [""])
    assert page.tags.count("li") == 2 and "script" not in page.tags
