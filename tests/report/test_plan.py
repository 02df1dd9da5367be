"""The plan: totals, look-up, text, JSON."""

import json
from pathlib import Path

import pytest

from fqcompile.report import Plan, Totals


def test_totals_count_scales_and_quantized_sites_alone(plan: Plan) -> None:
    after = (2 << 20) + 2048 + (9 << 20)
    assert plan.totals == Totals(
        sites=4,
        quantized=2,
        bytes_before=(36 << 20) + 32768 + 60,
        bytes_after=after + 32768 + 60,
        bits_per_weight=8 * after / (1024 * 2048 + 8 * 1024 * 2048),
        mean_relative_error=(0.01 + 0.09) / 2,
    )
    assert str(plan.totals) == (
        "quantized 2 of 4 sites: 36.03 → 11.03 MiB, 4.89 bits per quantized weight, "
        "mean error 0.0500"
    )


def test_totals_of_nothing_have_no_averages() -> None:
    assert str(Plan(()).totals) == "quantized 0 of 0 sites: 0.00 → 0.00 MiB"


def test_quantized_and_kept_divide_the_sites(plan: Plan) -> None:
    assert plan.quantized == plan.sites[:2]
    assert plan.kept == plan.sites[2:]


def test_site_is_found_by_name_or_missed_with_the_nearest(plan: Plan) -> None:
    assert plan.site("layers.2.mlp.router.weight") is plan.sites[2]
    nearest = (
        r"no site 'layers\.2\.mlp\.ruoter\.weight' among its 4; did you mean '.*router\.weight'"
    )
    with pytest.raises(KeyError, match=nearest):
        plan.site("layers.2.mlp.ruoter.weight")
    with pytest.raises(KeyError, match=r"no site 'zzz' among its 4"):
        plan.site("zzz")


def test_text_ends_with_totals_and_reasons_in_full_commonest_first(plan: Plan) -> None:
    router, hostile = plan.kept
    lines = str(Plan((router, hostile, hostile))).splitlines()
    assert lines[-3:] == [
        "quantized 0 of 3 sites: 0.03 → 0.03 MiB",
        f"kept 2: {hostile.reason}",
        f"kept 1: {router.reason}",
    ]


def test_json_holds_everything_but_the_recipe(plan: Plan) -> None:
    read = json.loads(plan.to_json())
    assert read["options"] == {"bits": 4, "include": []}
    assert read["totals"]["quantized"] == 2
    assert [site["name"] for site in read["sites"]] == [site.name for site in plan.sites]
    assert read["sites"][1]["shape"] == [8, 1024, 2048]
    assert "recipe" not in plan.to_json()


def test_html_is_written_where_asked(plan: Plan, tmp_path: Path) -> None:
    path = plan.to_html(tmp_path / "new" / "plan.html")
    assert path == tmp_path / "new" / "plan.html"
    assert "<h1>fqcompile plan</h1>" in path.read_text(encoding="utf-8")
