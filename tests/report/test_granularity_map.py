"""The map: which tile stands where, and how strong it is."""

import dataclasses
import re

import pytest

from fqcompile.report import Plan, Site
from fqcompile.report.granularity_map import grids_of, map_html, step_of

FORMAT = re.compile(r'<span class="tile ([\w ]+)"[^>]*>([^<]*)</span>')


@pytest.fixture
def site(plan: Plan) -> Site:
    return plan.sites[0]


def test_rows_are_layers_in_order_and_columns_roles_as_met(plan: Plan) -> None:
    (grid,), outside = grids_of(plan.sites)
    assert grid.stack == "layers"
    assert [place.layer for place in grid.layers] == [2, 10]
    assert [place.role for place in grid.roles] == [
        "attn.q_proj",
        "mlp.experts.down_proj",
        "mlp.router",
    ]
    assert {key: [s.name for s in cell] for key, cell in grid.cells.items()} == {
        (10, "attn.q_proj"): ["layers.10.attn.q_proj.weight"],
        (2, "mlp.experts.down_proj"): ["layers.2.mlp.experts.down_proj"],
        (2, "mlp.router"): ["layers.2.mlp.router.weight"],
    }
    assert [s.name for s in outside] == ['<script>alert("x")</script>']


def test_tiles_say_format_groups_and_experts(plan: Plan) -> None:
    (grid,), _ = grids_of(plan.sites)
    assert len(grid.layers) == 2
    tiles = FORMAT.findall(map_html(plan.sites))
    legend, layer_2, layer_10, outside = tiles[:3], tiles[3:5], tiles[5:6], tiles[6:]
    assert legend == [("bits4 step3", "int4 g64"), ("bits8 step0", "int8 col"), ("kept", "kept")]
    assert layer_2 == [("bits4 step3", "int4 g64 8e"), ("kept", "kept")]
    assert layer_10 == [("bits8 step0", "int8 col")]
    assert outside == [("kept", "kept")]


def test_experts_that_are_separate_weights_share_a_cell(site: Site) -> None:
    names = [f"layers.0.experts.{i}.w1.weight" for i in range(8)]
    fine = dataclasses.replace(site, bits=4, group_size=32)
    sites = [
        dataclasses.replace(fine if i == 5 else site, name=name) for i, name in enumerate(names)
    ]
    tiles = FORMAT.findall(map_html(sites))[2:]
    assert tiles == [("bits8 step0", "int8 col ×7"), ("bits4 step4", "int4 g32")]


def test_two_stacks_are_two_grids(site: Site) -> None:
    names = ["encoder.0.q.weight", "decoder.0.q.weight", "encoder.1.q.weight"]
    grids, outside = grids_of([dataclasses.replace(site, name=name) for name in names])
    assert [(g.stack, [p.layer for p in g.layers]) for g in grids] == [
        ("encoder", [0, 1]),
        ("decoder", [0]),
    ]
    assert outside == []


def test_steps_grow_as_groups_shrink(site: Site) -> None:
    sizes = [2048, 1024, 256, 255, 128, 64, 32, 16, 8, 1]
    steps = [step_of(dataclasses.replace(site, group_size=size)) for size in sizes]
    assert steps == [0, 1, 1, 2, 2, 3, 4, 5, 5, 5]
