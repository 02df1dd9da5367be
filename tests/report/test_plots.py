"""What the plots stand on: the worst experts, the points, and where layers begin."""

import dataclasses

import pytest

from fqcompile.report import Plan, Site
from fqcompile.report.plots import errors_html, worst_experts
from tests.report.page_parser import Page


@pytest.fixture
def linear(plan: Plan) -> Site:
    return plan.sites[0]


@pytest.fixture
def stack(plan: Plan) -> Site:
    return plan.sites[1]


def test_worst_experts_come_worst_first_from_all_stacks(stack: Site) -> None:
    sites = [
        dataclasses.replace(stack, name="a", expert_errors=(0.05, 0.11, 0.07)),
        dataclasses.replace(stack, name="b", expert_errors=(0.02, 0.10, *(0.01,) * 20)),
    ]
    table = worst_experts(sites)
    assert table.title == "worst 10 of 25 experts"
    rows = [tuple(cell.text for cell in row[:3]) for row in table.rows]
    assert rows[:4] == [
        ("0.1100", "1", "a"),
        ("0.1000", "1", "b"),
        ("0.0700", "2", "a"),
        ("0.0500", "0", "a"),
    ]
    assert len(rows) == 10


def test_points_stand_in_model_order_and_by_their_bits(linear: Site, stack: Site) -> None:
    sites = [linear, stack, dataclasses.replace(linear, name="last", relative_error=0.05)]
    page = Page(errors_html(sites))
    assert [title.split("\n")[0] for title in page.titles] == 2 * [s.name for s in sites]
    order = [value for name, value in page.attributes if name == "cx"][-2:]
    assert order == ["16.67%", "83.33%"]  # the middles of the first and the last third


def test_stack_without_known_experts_and_unknown_errors_are_left_out(
    linear: Site, stack: Site
) -> None:
    unknown = dataclasses.replace(linear, relative_error=None)
    endless = dataclasses.replace(linear, relative_error=float("inf"))
    assert "no quantized weight has a known error" in errors_html([unknown, endless])
    page = Page(errors_html([unknown, stack]))
    assert len(page.titles) == 2 and page.rows == {}


def test_layers_are_named_where_they_run(linear: Site) -> None:
    names = [f"layers.{layer}.{role}.weight" for layer in range(40) for role in "qk"]
    text = errors_html([dataclasses.replace(linear, name=name) for name in names])
    assert text.count('class="band"') == 20
    second = text.split("</figure>")[1]
    ticks = [t.split(">")[1].split("<")[0] for t in second.split("<text") if "middle" in t]
    assert ticks == ["0", "5", "10", "15", "20", "25", "30", "35"]
