"""Axes and marks: ticks that people would choose, and every point inside the drawing."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.report.page import HEIGHT, Axis, Point, axis_over, points_svg
from tests.report.page_parser import Page

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
    point = Point(0.5, 0.5, "</title><script>", '"', square=True, query='"<')
    text = points_svg([point], axis, axis, '"><script>')
    page = Page(text)
    assert "script" not in page.tags and page.titles == ["</title><script>"]
    assert ("aria-label", '"><script>') in page.attributes and ("role", "img") in page.attributes
    assert ("data-query", '"<') in page.attributes
    assert re.search("<b>", text) is None


@pytest.mark.parametrize("value", [0.0, 0.1, 8.0])
def test_axis_over_one_value_is_not_empty(value: float) -> None:
    axis = axis_over("v", [value])
    assert axis.low < value < axis.high
    assert axis.ticks
