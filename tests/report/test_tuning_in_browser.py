"""The page of a tuning report in a real browser: no errors, no network, sorted and filtered."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fqcompile.report.tuning_report import TuningReport
from tests.browser import Browser, assert_quiet, assert_readable, find_chromium
from tests.report import tuning_reports

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium on the PATH")

REPORTS: dict[str, Callable[[], TuningReport]] = {
    "tiny": tuning_reports.tiny,
    "large": tuning_reports.large,
    "biting": tuning_reports.biting,
}
ROWS = "[...document.querySelectorAll('#candidates tbody tr')]"
SHOWN = f"{ROWS}.filter(r => r.getClientRects().length).map(r => r.cells[0].textContent)"
OUTPUT = "document.querySelector('output').textContent"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: make().to_html(folder / f"{name}.html") for name, make in REPORTS.items()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", REPORTS)
def test_page_opens_quietly_and_fits(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    assert_quiet(browser, pages[name], width=width, dark=dark)


@pytest.mark.parametrize("name", REPORTS)
def test_marks_are_as_many_as_the_report_has_times(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    cases = REPORTS[name]().cases
    candidates = [c for case in cases for c in case.candidates]
    timed = [c for c in candidates if c.timing is not None]
    browser.open(pages[name])
    count = "document.querySelectorAll({!r}).length".format
    judged = sum(case.choice_over_best is not None for case in cases)
    assert browser.evaluate(count(".plot .point")) == len(timed) + judged
    assert browser.evaluate(count("#candidates tbody tr")) == len(candidates)
    assert browser.evaluate(count("#best-of-each-case tbody tr")) == len(cases)
    assert browser.evaluate(OUTPUT) == f"{len(candidates)} of {len(candidates)} candidates"


def test_points_stand_where_their_shares_say(browser: Browser, pages: dict[str, Path]) -> None:
    """Heights of the first case's two points, and the ends of their spans, above the zero line."""
    browser.open(pages["tiny"])
    heights = browser.evaluate(
        "(plot => { const zero = +plot.querySelector('line.grid').getAttribute('y1');"
        " return [...plot.querySelectorAll('.point')].slice(0, 2).map(p => {"
        " const mark = p.lastElementChild, span = p.querySelector('line');"
        " const y = mark.getAttribute('cy') ?? mark.getAttribute('y');"
        " return [y, span.getAttribute('y1'), span.getAttribute('y2')].map(at => zero - at);"
        " }); })(document.querySelector('.plot'))"
    )
    # b takes 25 [24, 26] µs; a, the best and so the last of its case, 20 [19, 21]: of 10.
    (b, *span_of_b), (a, *span_of_a) = heights
    unit = a * 20
    assert [unit / at for at in (b, *span_of_b)] == pytest.approx([25, 26, 24], rel=5e-3)
    assert [unit / at for at in span_of_a] == pytest.approx([21, 19], rel=5e-3)


@pytest.mark.parametrize(
    "source",
    [
        "document.querySelectorAll('#best-of-each-case td button')[1]",
        "document.querySelectorAll('.plot')[1].querySelectorAll('.point rect')[1]",
    ],
)
def test_a_case_shows_its_candidates(browser: Browser, pages: dict[str, Path], source: str) -> None:
    browser.open(pages["tiny"])
    browser.click(source)
    assert browser.evaluate(SHOWN) == ["2."] * 3
    assert browser.evaluate(OUTPUT) == "3 of 14 candidates"
    assert browser.complaints == []


def test_the_first_case_is_not_mistaken_for_the_tenth(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["large"])
    browser.click("document.querySelectorAll('#best-of-each-case td button')[0]")
    assert browser.evaluate(SHOWN) == ["1."] * 60


@pytest.mark.parametrize(("column", "sign"), [("over the best", 1), ("µs", -1)])
def test_click_on_a_header_sorts_by_its_numbers(
    browser: Browser, pages: dict[str, Path], column: str, sign: int
) -> None:
    browser.open(pages["large"])
    texts = "[...document.querySelectorAll('#candidates th')].map(h => h.textContent)"
    at = browser.evaluate(texts).index(column)
    for _ in range(1 if sign > 0 else 2):
        browser.click(f"document.querySelectorAll('#candidates th')[{at}].firstElementChild")
    cells = browser.evaluate(f"{ROWS}.map(r => r.cells[{at}].textContent)")
    numbers = [float(cell.strip("x").replace(",", "")) for cell in cells if cell]
    assert numbers == sorted(numbers, reverse=sign < 0)
    assert all(not cell for cell in cells[len(numbers) :])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_background(
    browser: Browser, pages: dict[str, Path], dark: bool
) -> None:
    assert_readable(browser, pages["tiny"], dark=dark)
