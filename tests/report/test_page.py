"""The page: whole without a network, no script but its own, every section named.

Of its pieces all text is escaped; a row stands for each row, and numbers sort by. Axes have ticks
that people would choose, and every point lies inside the drawing.
"""

import base64
import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.report import CompileReport, Plan
from fqcompile.report.page import (
    HEIGHT,
    Axis,
    Cell,
    Point,
    Section,
    Table,
    axis_over,
    details,
    filter_button,
    points_svg,
    render_page,
    table_html,
    unordered,
)
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
    assert page.facts["sites quantized"] == "0 of 0"
    assert page.rows == {"options": [["bits", "4", "4"]]}


def test_page_of_kept_sites_alone_says_that_nothing_is_quantized(
    plan: Plan, tmp_path: Path
) -> None:
    text = Plan(plan.kept).to_html(tmp_path / "plan.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.facts["sites quantized"] == "0 of 2"
    assert "none: nothing is quantized" in text and "there is none, or they came packed" in text
    assert "kernels" not in page.rows and len(page.rows["sites"]) == 2


def test_kept_sites_of_one_reason_are_one_line_and_keep_their_own_numbers(
    plan: Plan, tmp_path: Path
) -> None:
    sites = [replace(site, reason=f"{at} values are nan") for at, site in enumerate(plan.sites[2:])]
    text = Plan(tuple(sites)).to_html(tmp_path / "plan.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.summaries[0] == "2 sites, 0.03 MiB: … values are nan"
    assert "layers.2.mlp.router.weight, 8x2048: 0 values are nan</li>" in text


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
    colors = [value for name, value in Page(table_html(table)).attributes if name == "class"]
    assert colors[-3:] == ["bar0", "bar1", "over"]


def test_a_bad_cell_is_marked_and_columns_without_text_can_be_left_out() -> None:
    rows = ((Cell("1", 1.0, bad=True), Cell(""), Cell("")), (Cell("x"), Cell(""), Cell("y")))
    table = Table("t", ("a", "b", "c"), rows)
    assert ("class", "number bad") in Page(table_html(table)).attributes
    assert table.without_empty() == Table("t", ("a", "c"), tuple(row[::2] for row in rows))


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


VALUES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)


@given(VALUES, st.booleans())
def test_axis_holds_its_values_and_has_round_ticks(values: list[float], from_zero: bool) -> None:
    axis = axis_over("v", values, from_zero=from_zero)
    assert all(0 <= axis.share(value) <= 1 for value in values)
    assert 2 <= len(axis.ticks) <= 7
    steps = {round(b[0] - a[0], 12) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)}
    mantissa = max(steps) / 10.0 ** math.floor(math.log10(max(steps)) + 1e-9)
    assert any(math.isclose(mantissa, round_one, rel_tol=1e-5) for round_one in (1, 2, 5, 10))
    assert all(0 <= axis.share(value) <= 1 for value, _ in axis.ticks)
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_ticks_are_written_with_the_digits_they_need() -> None:
    errors = axis_over("e", [0.1], from_zero=True)
    assert [text for _, text in errors.ticks] == ["0.00", "0.05", "0.10"]
    assert [text for _, text in axis_over("b", [4.1, 8.0]).ticks] == ["4", "5", "6", "7", "8"]


def test_point_stands_where_its_values_say() -> None:
    axis = Axis("v", 0.0, 4.0, ())
    text = points_svg([Point(1.0, 3.0, "t", "bits4", span=(2.0, 4.0))], axis, axis, "l")
    attributes = Page(text).attributes
    assert ("cx", "25.00%") in attributes and ("cy", f"{HEIGHT / 4:.1f}") in attributes
    assert ("y1", f"{HEIGHT / 2:.1f}") in attributes and ("y2", "0.0") in attributes


def test_drawing_is_an_image_with_its_words_and_hostile_text_stays_text() -> None:
    axis = Axis("<x>", 0.0, 1.0, ((0.5, "<b>"),))
    point = Point(0.5, 0.5, "</title><script>", '"', square=True, query='"<', label='<"')
    text = points_svg([point], axis, axis, '"><script>')
    page = Page(text)
    assert "script" not in page.tags and page.titles == ["</title><script>"]
    assert ("aria-label", '"><script>') in page.attributes and ("role", "img") in page.attributes
    assert ("data-query", '"<') in page.attributes and ("data-label", '<"') in page.attributes
    assert re.search("<b>", text) is None


@pytest.mark.parametrize("value", [0.0, 0.1, 8.0])
def test_axis_over_one_value_is_not_empty(value: float) -> None:
    axis = axis_over("v", [value])
    assert axis.low < value < axis.high
    assert axis.ticks
