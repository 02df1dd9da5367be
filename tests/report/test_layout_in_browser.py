"""How pages look on a phone and on a desktop, in light and in dark: by boxes and by pictures.

No picture is stored. Fonts, and how they are smoothed, differ between machines, so that a stored
one would have to be compared so loosely that it told nothing. The pictures that are compared are of
one browser: a table at one end and at the other, a page in light and in dark.
"""

import itertools
from pathlib import Path

import pytest

from fqcompile.cli import main
from tests.browser import (
    Browser,
    Color,
    assert_quiet,
    assert_readable,
    find_chromium,
)
from tests.report import large_reports, tuning_reports

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium on the PATH")

PHONE, DESKTOP = 390, 1280
NAMES = ("dense plan", "experts report", "estimate", "tuning")
# L40S has 48 GB: bf16 does not fit on one, and int4 does.
ESTIMATE = (
    "estimate --model llama-3-70b --gpu h200,l40s --tp 1,8 --batch 16,64 --context 4096 --html"
)
# What is said, in how many lines, how much of it is cut off, and whether it has all of a row.
TILES = """[...document.querySelectorAll('.facts dt, .facts dd, .tile')].map(e => {
  const range = document.createRange();
  range.selectNodeContents(e);
  const lines = new Set([...range.getClientRects()].map(r => Math.round(r.top)));
  const row = e.closest('.facts'), tile = e.parentNode;
  const alone = row !== null && tile.offsetWidth === row.clientWidth;
  return [e.textContent, lines.size, e.scrollWidth - e.clientWidth, alone];
})"""
BOXES = """[...document.querySelectorAll('main *, header *, nav *')].map(e => {
  const box = e.getBoundingClientRect();
  return [box.x, box.y, box.width, box.height];
})"""
LABELS = """[...document.querySelectorAll('.plot')].map(plot => {
  const box = e => { const b = e.getBoundingClientRect(); return [b.x, b.y, b.right, b.bottom]; };
  return {
    frame: box(plot),
    labels: [...plot.querySelectorAll('.label')].map(e => [e.textContent, ...box(e)]),
    others: [...plot.querySelectorAll('text:not(.label), .point > :last-child')].map(box),
    labelled: [...plot.querySelectorAll('.labelled')].map(e => e.dataset.label),
    points: [...plot.querySelectorAll('.point')].map(e => e.dataset.label),
    highest: [...plot.querySelectorAll('.point')].map(e => [box(e.lastElementChild)[1],
      e.dataset.label]).sort((a, b) => a[0] - b[0])[0][1],
  };
})"""

Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    main([*ESTIMATE.split(), str(folder / "estimate.html")])
    return {
        "dense plan": large_reports.llama_8b().plan.to_html(folder / "plan.html"),
        "experts report": large_reports.mixtral().to_html(folder / "report.html"),
        "estimate": folder / "estimate.html",
        "tuning": tuning_reports.tiny().to_html(folder / "tuning.html"),
    }


def paper(browser: Browser) -> Color:
    text = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(part) for part in text.strip("rgb()").split(","))
    return red, green, blue


def distance(one: Color, other: Color) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["dense plan", "estimate"])
def test_page_opens_quietly_and_fits(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    assert_quiet(browser, pages[name], width=width, dark=dark)


def edges(browser: Browser, box: str) -> list[bool]:
    """Whether the left and the right end of a scrolling box are drawn as edges, from top to bottom.

    Lines between rows reach the ends too, and a header that stays in place covers what is below.
    """
    x, y, width, height = browser.evaluate(
        f"(e => {{ const b = e.getBoundingClientRect();"
        f" return [b.x + scrollX, b.y + scrollY, e.clientWidth, e.clientHeight] }})({box})"
    )
    seen = []
    for left in (x, x + width - 1):
        column = [row[0] for row in browser.picture(left, y, 1, height)]
        drawn = sum(distance(color, paper(browser)) > 30 for color in column)
        seen.append(drawn > 0.7 * len(column))
    return seen


@pytest.mark.few(4)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_wider_than_the_page_scrolls_and_has_an_edge_where_there_is_more(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.scroll')].map(e => [e.checkVisibility(),"
        " e.scrollWidth - e.clientWidth, e.querySelector('.map') !== null])"
    )
    wide = [number for number, (_, more, _) in enumerate(boxes) if more > 40]
    assert wide or width == DESKTOP
    for number, (visible, more, is_map) in enumerate(boxes):
        if not visible or 0 < more <= 40:
            continue
        box = f"document.querySelectorAll('.scroll')[{number}]"
        if not more:
            assert edges(browser, box) == [False, False]
            continue
        assert edges(browser, box) == [False, True]
        browser.evaluate(f"{box}.scrollLeft = {more}")
        # The layers of a map stay in place, and cover its left end.
        assert edges(browser, box) == [not is_map, False]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_whole_and_of_one_line(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    """But for a text that is longer than the page is wide."""
    browser.open(pages[name], width=width)
    tiles = browser.evaluate(TILES)
    assert len(tiles) >= 6
    assert not [tile for tile in tiles if tile[2] > 0]
    assert not [tile for tile in tiles if tile[1] != 1 and not tile[3]]
    assert width == PHONE or all(lines == 1 for _, lines, *_ in tiles)


@pytest.mark.parametrize("name", NAMES)
def test_bars_end_within_their_width(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    ends = browser.evaluate(
        "[...document.querySelectorAll('.bar rect')].map(r =>"
        " r.getBoundingClientRect().right - r.parentNode.getBoundingClientRect().right)"
    )
    assert all(end <= 0.01 for end in ends)
    assert ends or name == "tuning"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_what_does_not_fit_is_in_another_color(
    browser: Browser, pages: dict[str, Path], dark: bool
) -> None:
    assert_readable(browser, pages["estimate"], dark=dark)
    rows = browser.evaluate(
        "[...document.querySelectorAll('tbody tr')].map(r => {"
        " const text = [...r.cells].find(c => c.textContent === 'does not fit');"
        " const over = r.querySelector('.over');"
        " return [text && getComputedStyle(text).color, over && getComputedStyle(over).fill,"
        " getComputedStyle(r.cells[0]).color,"
        " +[...r.cells].find(c => c.querySelector('.bar')).dataset.value]; })"
    )
    assert {share > 1 for *_, share in rows} == {True, False}
    for text, bar, usual, share in rows:
        assert (text is not None) == (bar is not None) == (share > 1)
        assert text == bar and text != usual


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_points_have_labels_that_hide_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    browser.wait("document.querySelector('.label') !== null")
    for plot in browser.evaluate(LABELS):
        assert all(plot["points"]), "a point has no label"
        assert plot["highest"] in plot["labelled"]
        texts = [text for text, *_ in plot["labels"]]
        assert sorted(texts) == sorted(plot["labelled"])
        boxes = [box for _, *box in plot["labels"]]
        for one, other in itertools.combinations(boxes, 2):
            assert not overlap(one, other)
        for box in boxes:
            assert not any(overlap(box, other) for other in plot["others"])
            assert overlap_of(box, plot["frame"]) == pytest.approx(area(box), rel=1e-3)


def overlap_of(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def overlap(one: list[float], other: list[float]) -> bool:
    return overlap_of(one, other) > 0.5


def area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def test_a_point_without_room_for_its_label_shows_it_when_pointed_at(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["dense plan"])
    browser.wait("document.querySelector('.label') !== null")
    point = "document.querySelector('.plot .point:not(.labelled)')"
    wanted = browser.evaluate(f"{point}.dataset.label")
    browser.evaluate(f"{point}.scrollIntoView({{block: 'center'}})")
    x, y = browser.evaluate(
        f"(b => [b.x + b.width / 2, b.y + b.height / 2])"
        f"({point}.lastElementChild.getBoundingClientRect())"
    )
    on_top = browser.evaluate(f"document.elementFromPoint({x}, {y}).parentNode.dataset.label")
    shown = "[...document.querySelectorAll('.pointed')].map(e => e.textContent)"
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert browser.evaluate(shown) == [on_top] and wanted
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.evaluate(shown) == []


def test_labels_move_with_the_window(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["dense plan"], width=DESKTOP)
    count = "document.querySelectorAll('.plot .label').length"
    browser.wait(f"{count} > 0")
    wide = browser.evaluate(count)
    size = {"width": PHONE, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    browser.wait(f"{count} !== {wide}")
    assert browser.evaluate(count) == len(
        [label for plot in browser.evaluate(LABELS) for label in plot["labelled"]]
    )


SCALE = 0.25


def drawn(browser: Browser) -> list[list[bool]]:
    """Where anything but the paper is, on the whole page, in squares of four pixels."""
    width, height = browser.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    )
    rows, empty = browser.picture(0, 0, width, height, SCALE), paper(browser)
    return [[distance(color, empty) > 12 for color in row] for row in rows]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_light_and_dark_draw_the_same_at_the_same_place(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    boxes, pictures = [], []
    for dark in (False, True):
        browser.open(pages[name], width=width, dark=dark)
        browser.wait("document.querySelector('.label') !== null")
        assert (sum(paper(browser)) < 3 * 64) == dark
        boxes.append(browser.evaluate(BOXES))
        pictures.append(drawn(browser))
    assert boxes[0] == boxes[1]
    pairs = [
        pair
        for light, dark in zip(*pictures, strict=True)
        for pair in zip(light, dark, strict=True)
    ]
    both, either = sum(map(all, pairs)), sum(map(any, pairs))
    assert either > 0.05 * len(pairs)
    assert both > 0.9 * either
