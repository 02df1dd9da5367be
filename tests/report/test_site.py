"""A site as a record; the text table: what a row says, and that it fits."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from fqcompile.report import Plan, Site
from fqcompile.report.site import (
    PAGE_HEADERS,
    WIDTH,
    reasons_of,
    shorten,
    site_page_table,
    site_table,
)


def test_recipe_is_neither_compared_nor_shown_nor_written(plan: Plan) -> None:
    site = plan.sites[1]
    bare = dataclasses.replace(site, recipe=None)
    assert site.recipe is not None
    assert bare == site and hash(bare) == hash(site)
    assert "recipe" not in repr(site)
    assert "recipe" not in site.as_dict()


def test_dict_holds_every_other_field(plan: Plan) -> None:
    names = {f.name for f in dataclasses.fields(Site)} - {"recipe"}
    assert set(plan.sites[2].as_dict()) == names
    assert plan.sites[2].as_dict()["shape"] == [8, 2048]


def test_column_is_told_from_group(plan: Plan) -> None:
    assert [site.per_column for site in plan.sites] == [True, False, False, False]


def test_weights_of_a_stack_are_counted(plan: Plan) -> None:
    assert plan.sites[1].num_weights == 8 * 1024 * 2048


SITES = st.builds(
    Site,
    name=st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=90),
    kind=st.sampled_from(["linear", "experts"]),
    shape=st.lists(st.integers(1, 200_000), min_size=2, max_size=3).map(tuple),
    status=st.sampled_from(["quantized", "kept"]),
    reason=st.text(st.characters(codec="ascii", categories=["L"]), max_size=150),
    bits=st.sampled_from([4, 8]),
    group_size=st.none() | st.integers(1, 200_000),
    bytes_before=st.integers(0, 1 << 36),
    bytes_after=st.integers(0, 1 << 36),
    relative_error=st.none() | st.floats(0, 1),
    kernel=st.none() | st.text(st.characters(codec="ascii", categories=["L"]), max_size=60),
)


def test_rows_say_what_became_of_each_site(plan: Plan) -> None:
    column, grouped, router, _ = (line.split() for line in site_table(plan.sites).splitlines()[2:])
    name = "layers.10.attn.q_proj.weight"
    assert column == [
        name,
        "1024x2048",
        "int8",
        "column",
        "4.00",
        "→",
        "2.00",
        "0.0100",
        "x86_int8",
    ]
    assert grouped[1:5] == ["8x1024x2048", "int4", "64", "32.00"]
    assert grouped[6:] == ["9.00", "0.0900", "dequant_gemm", "16x64x64x1w4s3"]
    assert router[1:4] == ["8x2048", "kept", "0.03"]
    assert " ".join(router[4:]) == "feeds a top-k: routers are kept"


def test_table_of_nothing_is_its_header() -> None:
    assert len(site_table([]).splitlines()) == 2


@given(st.lists(SITES, max_size=5))
def test_table_has_a_line_a_site_and_fits_the_width(sites: list[Site]) -> None:
    lines = site_table(sites).splitlines()
    assert len(lines) == 2 + len(sites)
    assert max(map(len, lines)) <= WIDTH


def test_long_name_keeps_both_ends_and_reason_its_beginning(plan: Plan) -> None:
    name = f"layers.17.{'block.' * 20}gate_up_proj"
    reason = f"router: {'because ' * 20}"
    site = dataclasses.replace(plan.sites[2], name=name, reason=reason)
    line = site_table([site]).splitlines()[-1]
    assert len(line) == WIDTH
    assert line.startswith("layers.17.block.") and "gate_up_proj " in line
    assert "router: because" in line and line.endswith("…")


def test_name_is_whole_where_it_fits(plan: Plan) -> None:
    reason = "because " * 40
    site = dataclasses.replace(plan.sites[0], kernel=None, reason=reason)
    assert site_table([site]).splitlines()[-1].startswith(f"{site.name} ")


@given(st.text(), st.integers(1, 40), st.floats(0, 1))
def test_shortened_text_is_the_text_or_exactly_as_wide_as_asked(
    text: str, width: int, tail: float
) -> None:
    cut = shorten(text, width, tail)
    assert cut == text if len(text) <= width else len(cut) == width
    head, _, end = cut.partition("…") if cut != text else (text, "", "")
    assert text.startswith(head) and text.endswith(end)


def test_reasons_that_differ_in_numbers_alone_are_one(plan: Plan) -> None:
    reasons = [
        "1 of 64 values are nan; the first is nan at (3, 5)",
        "a router",
        "12 of 64 values are nan; the first is nan at (0, 5)",
        "1 of 64 values are inf",
        None,
        "2.5e-07 is small",
        "1 is small",
        "dtype is torch.float64",
        "dtype is torch.float8_e4m3fn",
    ]
    sites = [
        dataclasses.replace(plan.sites[2], name=str(number), reason=reason)
        for number, reason in enumerate(reasons)
    ]
    assert [(text, [site.name for site in group]) for text, group in reasons_of(sites)] == [
        ("… of 64 values are nan; the first is nan at (…, 5)", ["0", "2"]),
        ("… is small", ["5", "6"]),
        ("a router", ["1"]),
        ("1 of 64 values are inf", ["3"]),
        ("no reason recorded", ["4"]),
        ("dtype is torch.float64", ["7"]),
        ("dtype is torch.float8_e4m3fn", ["8"]),
    ]


@given(st.lists(SITES, max_size=8))
def test_every_site_is_under_one_reason_and_its_own_where_all_are_equal(sites: list[Site]) -> None:
    groups = reasons_of(sites)
    assert sorted(map(id, sites)) == sorted(id(site) for _, group in groups for site in group)
    counts = [len(group) for _, group in groups]
    assert counts == sorted(counts, reverse=True)
    for text, group in groups:
        own = {site.reason or "no reason recorded" for site in group}
        assert len(own) > 1 or own == {text}


def test_page_table_sorts_by_number(plan: Plan) -> None:
    table = site_page_table(plan.sites)
    before = table.headers.index("MiB before")
    assert [row[before].value for row in table.rows] == [4 << 20, 32 << 20, 32768, 60]
    assert all(len(row) == len(table.headers) for row in table.rows)


def test_experts_have_their_worst_named_in_the_page_and_one_line_in_the_text(plan) -> None:
    one, other = plan.sites[1], dataclasses.replace(plan.sites[1], name="up")
    stacks = (
        dataclasses.replace(one, expert_errors=(0.05, 0.11, 0.07)),
        dataclasses.replace(other, expert_errors=(0.02, 0.10)),
    )
    cells = site_page_table(stacks).rows
    column = PAGE_HEADERS.index("worst expert")
    assert [row[column].text for row in cells] == ["0.1100 (expert 1)", "0.1000 (expert 1)"]
    (line,) = Plan(stacks).expert_lines()
    assert line == (
        "experts: 5 in 2 stacks, errors 0.0200 to 0.1100; the worst is expert 1 of "
        "layers.2.mlp.experts.down_proj"
    )
    assert line in str(Plan(stacks))
    assert Plan(plan.sites[:1]).expert_lines() == []
