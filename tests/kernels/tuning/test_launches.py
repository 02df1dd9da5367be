"""Which configurations a kernel gets, for each mode, table and range of rows."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.kernels.spec import DENSE, GemmSpec, LaunchTable, TileConfig
from fqcompile.kernels.template import DEQUANTIZE, Template
from fqcompile.kernels.tuning import launches as launches_module
from fqcompile.kernels.tuning.key import Ends, bucket_of, tuning_key
from fqcompile.kernels.tuning.launches import (
    Chosen,
    ends_in_a_model,
    steps_in_range,
    tuned_launches,
)
from fqcompile.kernels.tuning.measure import Measure
from fqcompile.kernels.tuning.table import Timing, Trial, TunedTable
from tests.kernels.tuning.fake import CLOSED, FAST, MAX, SPEC, TEMPLATE, FakeMeasure

KEY = tuning_key(SPEC, TEMPLATE.layout.name)
DYNAMIC = replace(SPEC, m_range=(1, None))


@pytest.fixture
def table(tmp_path: Path) -> TunedTable:
    return TunedTable.load(tmp_path / "t.json", {"gpu": "NVIDIA H200"})


def _trial(config: TileConfig, us: float = 1.0) -> Trial:
    return Trial(config, Timing(us, us, us))


def test_off_without_a_table_is_the_closed_form(table: TunedTable) -> None:
    measure = FakeMeasure()
    for spec in (SPEC, DYNAMIC):
        chosen = tuned_launches(spec, TEMPLATE, "off", measure, table)
        assert chosen == Chosen(TEMPLATE.launches(spec), "heuristic")
    assert not measure.set_up


def test_off_takes_what_the_table_has(table: TunedTable) -> None:
    table.add(KEY, 16, _trial(FAST[5]))
    measure = FakeMeasure()
    chosen = tuned_launches(SPEC, TEMPLATE, "off", measure, table)
    assert chosen == (LaunchTable.of(FAST[5]), "tuned table", ())
    chosen = tuned_launches(DYNAMIC, TEMPLATE, "off", measure, table)
    assert str(chosen.launches) == f"m16={FAST[5]},m128={CLOSED.at(128)},dense"
    assert chosen.source == "tuned table"
    assert not measure.set_up


@pytest.mark.parametrize("m", [9, 12, 16])
def test_all_rows_of_a_bucket_share_its_entry(m: int, table: TunedTable) -> None:
    table.add(KEY, 16, _trial(FAST[5]))
    spec = replace(SPEC, m=m)
    assert tuned_launches(spec, TEMPLATE, "off", table=table).source == "tuned table"
    other = replace(SPEC, m=17)
    assert tuned_launches(other, TEMPLATE, "off", table=table).source == "heuristic"


def test_fast_searches_once_and_then_reads(table: TunedTable) -> None:
    measure = FakeMeasure()
    expected = LaunchTable.of(FAST[-1])
    assert tuned_launches(SPEC, TEMPLATE, "fast", measure, table) == (expected, "searched", ())
    layer = replace(SPEC, m=11, has_bias=True, activation="gelu")
    chosen = tuned_launches(layer, TEMPLATE, "fast", measure, table)
    assert chosen == (expected, "tuned table", ())
    assert measure.set_up == [16]


def test_max_searches_where_only_a_fast_search_was(table: TunedTable) -> None:
    measure = FakeMeasure()
    for mode, source in (
        ("fast", "searched"),
        ("max", "searched"),
        ("max", "tuned table"),
        ("fast", "tuned table"),
    ):
        assert tuned_launches(SPEC, TEMPLATE, mode, measure, table).source == source  # type: ignore[arg-type]
    assert measure.tried == list(MAX)
    best = tuned_launches(SPEC, TEMPLATE, "off", measure, table).launches
    assert best == LaunchTable.of(MAX[-1])


def test_open_rows_are_measured_at_both_ends_of_each_step(table: TunedTable) -> None:
    measure = FakeMeasure()
    for source in ("searched", "tuned table"):
        chosen = tuned_launches(DYNAMIC, TEMPLATE, "fast", measure, table)
        assert chosen.source == source
    assert measure.set_up == [1, 16, 17, 128, 2048]
    # The fake's best is the same for all rows, so one kernel serves them.
    assert chosen.launches == LaunchTable.of(FAST[-1])


# Microseconds for the first and for the last number of rows of a step.
A, B, C = FAST[1:4]
LOSSES: dict[str, tuple[dict[TileConfig, float], dict[TileConfig, float], TileConfig | None]] = {
    "the last end alone would take A": ({A: 20, B: 11, C: 10}, {A: 30, B: 32, C: 45}, B),
    "the first end alone would take C": ({A: 14, C: 10}, {A: 30, C: 45}, A),
    "a loss is relative": ({A: 10, B: 16}, {A: 1500, B: 1000}, A),
    "only what has a time at both": ({A: 10, B: 12}, {B: 30, C: 20}, B),
    "of equals, the first": ({A: 10, B: 20}, {A: 20, B: 10}, A),
    "where one end was not measured, the other": ({}, {A: 10, B: 9}, B),
    "nothing at both": ({A: 10}, {B: 10}, None),
}


@pytest.mark.parametrize(("first", "last", "best"), LOSSES.values(), ids=list(LOSSES))
def test_a_step_gets_what_loses_least_at_both_ends(
    first: dict[TileConfig, float],
    last: dict[TileConfig, float],
    best: TileConfig | None,
    table: TunedTable,
) -> None:
    for rows, times in ((17, first), (128, last)):
        for config, us in times.items():
            table.add(KEY, rows, _trial(config, us))
    for loaded in (table, TunedTable.load(table.path, table.fingerprint)):
        launches = tuned_launches(DYNAMIC, TEMPLATE, "off", table=loaded).launches
        assert launches is not None
        assert launches.at(128) == launches.at(17) == (best or CLOSED.at(128))
        assert (launches.at(16), launches.at(129)) == (CLOSED.at(16), DENSE)


def test_a_search_of_a_step_leaves_the_bucket_of_its_end_open(table: TunedTable) -> None:
    """The bucket's own candidates may be others."""
    measure = FakeMeasure()
    tuned_launches(DYNAMIC, TEMPLATE, "fast", measure, table)
    assert table.case(KEY, 16).searched is None
    template = replace(TEMPLATE, candidates=lambda spec, m, mode, fewest=None: MAX[:14])
    chosen = tuned_launches(SPEC, template, "fast", measure, table)
    assert chosen == (LaunchTable.of(MAX[13]), "searched", ())
    assert measure.tried[-2:] == list(MAX[12:14])


def test_an_end_that_cannot_be_measured_is_told(table: TunedTable) -> None:
    def no_measure(template: Template, spec: GemmSpec, m: int) -> Measure:
        if m == 17:
            raise RuntimeError("out of memory")
        return FakeMeasure()(template, spec, m)

    chosen = tuned_launches(DYNAMIC, TEMPLATE, "fast", no_measure, table)
    assert chosen.notes == ("M = 17: nothing could be measured: RuntimeError: out of memory",)
    assert chosen.launches == LaunchTable.of(FAST[-1])


def test_where_every_candidate_fails_the_closed_form_stays_with_the_reason(
    table: TunedTable,
) -> None:
    measure = FakeMeasure({config: RuntimeError("no") for config in FAST})
    for mode in ("fast", "off", "fast"):
        chosen = tuned_launches(SPEC, TEMPLATE, mode, measure, table)  # type: ignore[arg-type]
        assert chosen.launches == LaunchTable.of(CLOSED.at(16))
        assert chosen.source == "heuristic"
        assert len(chosen.notes) == 1
        assert chosen.notes[0].startswith("M <= 16: all 12 configurations failed")
    assert len(measure.tried) == len(FAST)


def test_a_configuration_that_the_kernel_does_not_offer_is_not_used(table: TunedTable) -> None:
    table.add(KEY, 16, _trial(TileConfig(256, 256, 256, 64, 16, 9), 0.5))
    chosen = tuned_launches(SPEC, TEMPLATE, "off", table=table)
    assert chosen == (LaunchTable.of(CLOSED.at(16)), "heuristic", ())
    table.add(KEY, 16, _trial(MAX[-1], 2.0))
    chosen = tuned_launches(SPEC, TEMPLATE, "off", table=table)
    assert chosen.launches == LaunchTable.of(MAX[-1])


def test_a_kernel_without_configurations_and_a_cpu_are_left_alone(table: TunedTable) -> None:
    measure = FakeMeasure()
    assert tuned_launches(SPEC, DEQUANTIZE, "max", measure, table) == (None, "heuristic", ())
    on_cpu = replace(SPEC, gpu=None)
    expected = (LaunchTable.of(CLOSED.at(16)), "heuristic", ())
    assert tuned_launches(on_cpu, TEMPLATE, "max", measure, table) == expected
    assert not measure.set_up


def test_the_machines_own_table_is_the_default(
    table: TunedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches_module, "table_for", lambda gpu: table)
    table.add(KEY, 16, _trial(FAST[5]))
    assert tuned_launches(SPEC, TEMPLATE, "off").launches == LaunchTable.of(FAST[5])


@pytest.mark.parametrize(
    ("m_range", "expected"),
    [
        ((1, None), [(16, (1, 16)), (128, (17, 128)), (None, (None,))]),
        ((0, None), [(16, (1, 16)), (128, (17, 128)), (None, (None,))]),
        ((16, None), [(16, (16,)), (128, (17, 128)), (None, (None,))]),
        ((17, None), [(128, (17, 128)), (None, (None,))]),
        ((129, None), [(None, (None,))]),
        ((1, 100), [(16, (1, 16)), (None, (17, 100))]),
        ((1, 128), [(16, (1, 16)), (None, (17, 128))]),
        ((1, 300), [(16, (1, 16)), (128, (17, 128)), (None, (129, 300))]),
        ((1, 3), [(None, (1, 3))]),
        ((0, 0), [(None, (1,))]),
        ((600, 700), [(None, (600, 700))]),
        (None, [(None, (16,))]),
    ],
)
def test_only_steps_within_reach_are_kept(
    m_range: tuple[int, int | None] | None, expected: list[tuple[int | None, Ends]]
) -> None:
    steps = steps_in_range(replace(SPEC, m_range=m_range), CLOSED)
    assert [(bound, ends) for bound, ends, _ in steps] == expected


@st.composite
def _ranges(draw: st.DrawFn) -> tuple[int, int | None]:
    low = draw(st.integers(0, 1000))
    return low, draw(st.none() | st.integers(low, 2000))


@given(
    _ranges(),
    st.lists(st.sampled_from([1, 3, 4, 16, 64, 100, 128, 512, 777]), unique=True).map(sorted),
    st.data(),
)
def test_any_range_gets_kernels_that_cover_it(
    m_range: tuple[int, int | None], bounds: Sequence[int], data: st.DataObject
) -> None:
    steps = [(bound, TileConfig(16, 16, 16, num_stages=i + 1)) for i, bound in enumerate(bounds)]
    closed = LaunchTable((*steps, (None, DENSE)))
    spec = replace(SPEC, m_range=m_range)
    template = replace(TEMPLATE, launches=lambda spec: closed)
    table = TunedTable(Path("/proc/none"), {}, {})
    for m in data.draw(st.lists(st.integers(0, 2000)), label="tuned at"):
        at = data.draw(st.sampled_from([m, bucket_of(m, SPEC)]))
        table._cases[KEY, at] = launches_module.Case((_trial(FAST[1 + m % 11]),))
    chosen = tuned_launches(spec, template, "off", table=table).launches
    assert chosen is not None
    assert all(before != after for (_, before), (_, after) in pairwise(chosen.steps))
    low, high = m_range
    for m in {low, high or 5000, *(b for b in bounds if low <= b <= (high or b))}:
        assert chosen.at(m) is not None
    assert all(bound >= low for bound, _ in chosen.steps if bound is not None)
    assert LaunchTable.parse(str(chosen)) == chosen


@pytest.mark.parametrize("m", [0, 1, 16, 17, 128, 129, 4000])
def test_each_row_keeps_its_closed_form(m: int, table: TunedTable) -> None:
    launches = tuned_launches(DYNAMIC, TEMPLATE, "off", table=table).launches
    assert launches is not None
    assert launches.at(m) == CLOSED.at(m)


def test_a_model_looks_up_one_row_and_the_steps_of_the_closed_form() -> None:
    assert ends_in_a_model(SPEC, TEMPLATE) == [(1,), (1, 16), (17, 128), (None,)]
    assert ends_in_a_model(SPEC, DEQUANTIZE) == []
