"""A tuning report's numbers, worked out again from its times; as text, as JSON and on the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.kernels.tuning.table import Timing
from fqcompile.report.tuning_case import Candidate, TuningCase
from fqcompile.report.tuning_report import TuningReport
from tests.report import tuning_reports
from tests.report.page_parser import Page
from tests.report.tuning_reports import REASON, TINY, tiny

LAYERS = ["64x256"] * 2 + ["512x256"] * 3
FORM = "int4 g128 bfloat16"


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(tiny().to_html(tmp_path / "tuned.html").read_text(encoding="utf-8"))


# Of each case: the best, its µs, spread and share; the choice's µs, its ratio, what became of it.
EXPECTED = [
    ("a", "20.0", "10.0%", "50%", "20.0", "1.00x", "best"),
    ("b", "20.0", "7.5%", "50%", "21.0", "1.05x", "within the spread"),
    ("b", "16.0", "12.5%", "62%", "30.0", "1.88x", "slower"),
    ("b", "20.4", "3.9%", "49%", "24.0", "1.18x", "slower"),
    ("none", "", "", "", "", "", ""),
]


def test_each_case_has_its_best_and_what_the_choice_loses(page: Page) -> None:
    rows = page.rows["best-of-each-case"]
    for number, (row, layer, expected) in enumerate(zip(rows, LAYERS, EXPECTED, strict=True), 1):
        best, us, spread, share, chosen, ratio, verdict = expected
        m = TINY[number - 1].spec.m
        head = [f"{number}.", f"{layer} {FORM}", f"M <= {m}", best, us, spread, share]
        tried = "2, 2 refused" if number == 5 else "3, 1 refused"
        assert row == [*head, "a", chosen, ratio, verdict, "10.0", tried]


def test_every_candidate_is_there_with_its_time_or_its_refusal(page: Page) -> None:
    rows = page.rows["candidates"]
    assert len(rows) == sum(len(case.candidates) for case in TINY) == 14
    assert rows[0] == [
        "1.", f"64x256 {FORM}", "M <= 1", "a", "20.0", "19.0", "21.0", "10.0%", "50%", "1.00x",
        "best, heuristic",
    ]  # fmt: skip
    assert rows[1][4:] == ["25.0", "24.0", "26.0", "8.0%", "40%", "1.25x", ""]
    assert rows[3][-2:] == ["1.05x", "within the spread, heuristic"]
    assert rows[2][3:] == ["c", "", "", "", "", "", "", f"refused: {REASON}"]
    assert rows[12][3:] == ["a", *[""] * 6, f"heuristic, refused: {REASON}"]


def test_facts_count_what_is_in_the_tables(page: Page) -> None:
    assert page.facts == {
        "cases: a matmul at a number of rows": "5",
        "candidates measured, each after its result was checked": "8",
        "candidates refused": "6",
        "of the roofline, by the best": "49% to 62%",
        "cases where the heuristic is slower": "2 of 4",
        "the most that the heuristic takes of the best's time": "1.88x",
    }


def test_plots_have_a_point_for_each_time_and_for_each_choice(page: Page) -> None:
    assert len(page.titles) == 8 + 4
    where = f"64x256 {FORM}, M <= 16"
    assert f"{where}\nb\n20.0 [19.0, 20.5] µs, 50% of the roofline" in page.titles
    assert f"{where}\na: 1.05 times b's time, within the spread" in page.titles
    assert ("data-query", "^2.") in page.attributes


def test_reasons_are_folded_with_all_who_gave_them(page: Page) -> None:
    assert page.summaries[:2] == [f"5 × {REASON}", "1 × out of resource"]
    assert page.summaries[2] == "left out: 1"


def test_the_page_says_what_it_was_measured_on(page: Page) -> None:
    rows = page.rows["how-it-was-measured"]
    assert rows == [["device", "NVIDIA H200"], ["commit", "abc1234"], ["torch", "2.13.0"]]


def test_text_has_the_table_the_losses_and_every_refusal() -> None:
    lines = str(tiny()).splitlines()
    third = next(line for line in lines if line.startswith(f"512x256 {FORM}"))
    for text in ("M <= 16", "16.0 [15.0, 17.0]", "62%", "1.88x", "3, 1 refused"):
        assert text in third
    assert (
        "heuristic: the best in 1 of 4 cases, within the spread of the best in 1, slower in 2; "
        f"at most 1.88x (512x256 {FORM}, M <= 16)"
    ) in lines
    where = f"64x256 {FORM}, M <= 1, M <= 16; 512x256 {FORM}, M <= 16"
    assert f"{where}: c refused: {REASON}" in lines
    assert f"512x256 {FORM}, M <= 64: c refused: out of resource" in lines
    assert f"512x256 {FORM}, M <= 512: all 2 configurations failed" in lines
    assert "left out: 9x9: no time" in lines


def test_times_below_the_least_are_doubted() -> None:
    fast = replace(TINY[2], ideal_us=20.0)
    text = str(TuningReport([TINY[0], fast], {}))
    assert (
        f"in 1 of 2 cases the best is faster than the roofline, up to 125% of it ({fast.name})"
        in text
    )
    assert "faster than the roofline" not in str(tiny())


def test_what_is_refused_everywhere_is_said_once() -> None:
    text = str(TuningReport(TINY[:3], {}))
    assert f"all cases: c refused: {REASON}" in text
    assert text.count(REASON) == 1


def test_json_has_everything(tmp_path: Path) -> None:
    path = tiny().write(tmp_path / "tuned.json")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert content["fingerprint"] == {"torch": "2.13.0"}
    assert (content["choice"], content["left_out"]) == ("heuristic", ["9x9: no time"])
    fourth = content["cases"][3]
    assert (fourth["n"], fourth["k"], fourth["rows"]) == (512, 256, 64)
    assert (fourth["best"], fourth["choice"], fourth["verdict"]) == ("b", "a", "slower")
    assert fourth["choice_over_best"] == pytest.approx(24.0 / 20.4)
    assert fourth["final"]["b"] == {"microseconds": 20.4, "low": 20.0, "high": 20.8}
    a, _, c = fourth["trials"]
    assert a == {
        "config": "a", "microseconds": 26.0, "low": 25.0, "high": 27.0,
        "spread": pytest.approx(2 / 26), "of_ideal": pytest.approx(10 / 26),
    }  # fmt: skip
    assert c == {"config": "c", "refusal": "out of resource"}


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    text = tuning_reports.biting().to_html(tmp_path / "t.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_a_run_that_measured_nothing_still_has_a_page(tmp_path: Path) -> None:
    report = TuningReport([], {"device": "x"}, left_out=("4x4: no time",))
    page = Page(report.to_html(tmp_path / "t.html").read_text(encoding="utf-8"))
    assert list(page.rows) == ["how-it-was-measured"]
    assert str(report) == "left out: 4x4: no time"


POSITIVE = st.floats(0.1, 1e6)
TIMINGS = st.lists(POSITIVE, min_size=3, max_size=3).map(
    lambda found: Timing(sorted(found)[1], min(found), max(found))
)


@given(st.lists(st.one_of(TIMINGS, st.none()), min_size=1, max_size=6), st.data())
def test_best_ratio_and_verdict_follow_from_the_times(
    timings: list[Timing | None], data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(0, len(timings) - 1), "choice")
    candidates = tuple(
        Candidate(str(i), t, None if t else "refused") for i, t in enumerate(timings)
    )
    case = TuningCase(tuning_reports.spec(64, 256, 1), "k", "M <= 1", 5.0, str(chosen), candidates)
    ranked = sorted((t.microseconds, i) for i, t in enumerate(timings) if t)
    assert case.best == (str(ranked[0][1]) if ranked else None)
    own = timings[chosen]
    if own is None:
        assert case.choice_over_best is case.verdict is None
        return
    fastest = timings[ranked[0][1]]
    assert fastest is not None
    assert case.choice_over_best == own.microseconds / ranked[0][0] >= 1
    apart = max(own.low, fastest.low) > min(own.high, fastest.high)
    if ranked[0][1] == chosen:
        assert case.verdict == "best"
    else:
        assert case.verdict == ("slower" if apart else "within the spread")
