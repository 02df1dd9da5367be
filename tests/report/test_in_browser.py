"""The page in a real browser: no errors, no network, and what clicks and keys do."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fqcompile.report import CompileReport
from fqcompile.report.site import site_page_table
from tests.browser import Browser, assert_quiet, assert_readable, find_chromium
from tests.report import large_reports

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium on the PATH")

REPORTS: dict[str, Callable[[], CompileReport]] = {
    "llama_8b": large_reports.llama_8b,
    "mixtral": large_reports.mixtral,
    "biting": large_reports.biting,
}
SITES = "[...document.querySelectorAll('#sites tbody tr')]"
SHOWN = f"{SITES}.filter(r => r.getClientRects().length).map(r => r.cells[0].textContent)"


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
def test_marks_are_as_many_as_the_report_has_sites(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    report = REPORTS[name]()
    browser.open(pages[name])
    count = "document.querySelectorAll({!r}).length".format
    known = [s for s in report.plan.quantized if s.relative_error is not None]
    assert browser.evaluate(count("#sites tbody tr")) == len(report.sites)
    assert browser.evaluate(count(".map .tile, .tiles .tile")) == len(report.sites)
    assert browser.evaluate(count(".plot .point")) == 2 * len(known)
    assert browser.evaluate(count("#kept-and-why li")) == len(report.plan.kept)
    facts = browser.evaluate("[...document.querySelectorAll('dd')].map(d => d.textContent)")
    assert facts[0] == f"{len(report.plan.quantized)} of {len(report.sites)}"


def expected_order(report: CompileReport, column: str, sign: int) -> list[str]:
    """Names in the order of a column: by size with blanks last, or as people sort texts."""

    def natural(text: str) -> list[tuple[bool, int, str]]:
        return [
            (p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in re.split(r"(\d+)", text)
        ]

    table = site_page_table(report.sites)
    at = table.headers.index(column)
    if any(row[at].value is not None for row in table.rows):
        have = [row for row in table.rows if row[at].value is not None]
        none = [row for row in table.rows if row[at].value is None]
        rows = [*sorted(have, key=lambda row: sign * (row[at].value or 0.0)), *none]
    else:
        rows = sorted(table.rows, key=lambda row: natural(row[at].text), reverse=sign < 0)
    return [row[0].text for row in rows]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("llama_8b", "name"),
        ("llama_8b", "shape"),
        ("llama_8b", "MiB after"),
        ("mixtral", "error"),
        ("mixtral", "worst expert"),
        ("mixtral", "reason"),
    ],
)
def test_click_on_a_header_sorts_one_way_then_the_other(
    browser: Browser, pages: dict[str, Path], name: str, column: str
) -> None:
    report = REPORTS[name]()
    browser.open(pages[name])
    at = site_page_table(report.sites).headers.index(column)
    head = f"document.querySelectorAll('#sites th')[{at}]"
    for order, sign in (("ascending", 1), ("descending", -1)):
        browser.click(f"{head}.firstElementChild")
        assert browser.evaluate(f"{head}.ariaSort") == order
        names = browser.evaluate(SHOWN)
        assert sorted(names) == sorted(site.name for site in report.sites)
        assert names == expected_order(report, column, sign)
    sorted_heads = "document.querySelectorAll('#sites th:not([aria-sort=none])').length"
    assert browser.evaluate(sorted_heads) == 1


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("down_proj", r"down_proj"),
        ("^model.layers.1. mlp", r"^model\.layers\.1\.mlp"),
        ("^layers.1.", r"(?!)"),
        ("KEPT", r"embed_tokens"),
        ("nothing at all", r"(?!)"),
    ],
)
def test_typing_filters_the_sites(
    browser: Browser, pages: dict[str, Path], typed: str, wanted: str
) -> None:
    names = [site.name for site in large_reports.llama_8b().sites]
    browser.open(pages["llama_8b"])
    browser.click("document.querySelector('input')")
    browser.type(typed)
    expected = [name for name in names if re.search(wanted, name)]
    assert browser.evaluate(SHOWN) == expected
    output = "document.querySelector('output').textContent"
    assert browser.evaluate(output) == f"{len(expected)} of {len(names)} sites"
    browser.click("document.querySelector('.clear')")
    assert browser.evaluate(SHOWN) == names


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("document.querySelectorAll('.map tbody th button')[3]", r"layers\.3\."),
        ("document.querySelectorAll('.map thead th button')[1]", r"k_proj"),
        ("document.querySelector('#sizes td button')", r"gate_proj"),
        ("document.querySelectorAll('.plot')[1].querySelectorAll('circle')[6]", r"s\.0\.mlp\.down"),
        ("document.querySelectorAll('#kernels td button')[1]", r"lm_head"),
        ("document.querySelector('.tiles button')", r"lm_head"),
    ],
)
def test_marks_filter_the_sites_they_stand_for(
    browser: Browser, pages: dict[str, Path], source: str, wanted: str
) -> None:
    names = [site.name for site in large_reports.llama_8b().sites]
    browser.open(pages["llama_8b"])
    browser.click(source)
    assert browser.evaluate(SHOWN) == [name for name in names if re.search(wanted, name)]
    assert browser.evaluate("document.activeElement.type") == "search"
    assert browser.complaints == []


def test_keys_open_a_diff(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["llama_8b"])
    assert browser.evaluate("document.querySelector('.diff').checkVisibility()") is False
    browser.evaluate("document.querySelector('.diff').previousElementSibling.focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('.diff').checkVisibility()")
    text = browser.evaluate("document.querySelector('.diff').textContent")
    assert "+    y = torch.ops.fqcompile.matmul(x, w)" in text.splitlines()


def test_tab_goes_from_control_to_control(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["mixtral"])
    seen = []
    for _ in range(9):
        browser.press("Tab")
        seen.append(browser.evaluate("document.activeElement.textContent"))
    assert seen[:3] == ["sizes", "granularity map", "errors"]
    assert seen[8].strip().startswith("role"), "the first table scrolls by the keyboard"


def test_everything_to_use_or_to_look_at_has_a_name(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["mixtral"])
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "image", "searchbox", "region", "table", "columnheader", "rowheader"}
    named: dict[str, list[str]] = {}
    for node in nodes:
        role = str(node.get("role", {}).get("value"))
        if role in roles and not node.get("ignored"):
            named.setdefault(role, []).append(str(node.get("name", {}).get("value", "")))
    unnamed = [role for role, names in named.items() if role != "table" and not all(names)]
    assert not unnamed, unnamed
    assert len(named["image"]) == 2 and "relative error" in named["image"][0]
    assert "show the sites of layer 7" in named["button"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["llama_8b", "mixtral"])
def test_text_stands_out_from_its_background(
    browser: Browser, pages: dict[str, Path], name: str, dark: bool
) -> None:
    assert_readable(browser, pages[name], dark=dark)


def luminance(color: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    deep, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (deep + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("bits", [4, 8])
def test_finer_groups_are_ever_farther_from_the_paper(
    browser: Browser, pages: dict[str, Path], bits: int, dark: bool
) -> None:
    browser.open(pages["mixtral"], dark=dark)
    tile = "document.querySelector('.tile')"
    colors: list[str] = []
    for step in range(6):
        browser.evaluate(f"{tile}.className = 'tile bits{bits} step{step}'")
        colors.append(browser.evaluate(f"getComputedStyle({tile}).backgroundColor"))
        ink = browser.evaluate(f"getComputedStyle({tile}).color")
        assert contrast(ink, colors[-1]) >= 4.5, (step, ink, colors[-1])
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    ratios = [contrast(paper, color) for color in colors]
    steps = [b / a for a, b in pairwise(ratios)]
    assert ratios[0] > 1.05 and min(steps) > 1.15, ratios


def test_no_script_but_the_page_s_own_may_run(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["mixtral"])
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {text: 'window.bitten = 1'}))"
    )
    assert browser.evaluate("typeof bitten") == "undefined"
    assert any("Content Security Policy" in text for text in browser.complaints)
