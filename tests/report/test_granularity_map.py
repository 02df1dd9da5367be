"""The map: which tile stands where, and how strong it is.

Layer and role are read from parameter names as models have them.
"""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.report import Plan, Site
from fqcompile.report.granularity_map import grids_of, map_html, place_of, step_of

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


NAMES = [
    ("model.layers.3.self_attn.q_proj.weight", "model.layers", 3, "self_attn.q_proj"),
    ("encoder.layer.11.output.dense.weight", "encoder.layer", 11, "output.dense"),
    ("transformer.h.0.attn.c_attn.weight", "transformer.h", 0, "attn.c_attn"),
    ("decoder.block.2.layer.1.EncDec.q.weight", "decoder.block", 2, "layer.1.EncDec.q"),
    ("layers.2.mlp.experts.down_proj", "layers", 2, "mlp.experts.down_proj"),
    ("layers.2.mlp.experts.7.w1.weight", "layers", 2, "mlp.experts.*.w1"),
    ("layers.2.mlp.experts.gate_up_proj[1]", "layers", 2, "mlp.experts.gate_up_proj[1]"),
    ("0.weight", "", 0, "weight"),
    ("lm_head.weight", "", None, "lm_head"),
    ("head.5", "", None, "head.5"),
    ("0.", "", None, "0."),
    ("layers.².w", "", None, "layers.².w"),
    ("a.1.q.weight+a.1.k.weight", "a", 1, "q+k"),
    ("a.1.q.weight+a.2.k.weight", "a", 1, "q+a.2.k"),
    ("w.weight+v.weight", "", None, "w+v"),
]


@pytest.mark.parametrize(("name", "stack", "layer", "role"), NAMES, ids=[n for n, *_ in NAMES])
def test_layer_is_the_first_number_and_role_what_follows(
    name: str, stack: str, layer: int | None, role: str
) -> None:
    place = place_of(name)
    assert (place.stack, place.layer, place.role) == (stack, layer, role)


def matches(name: str, query: str) -> bool:
    """What the page's filter does with the words of a query, on a row that begins with the name."""
    words = query.lower().split()
    text = name.lower()
    return all(text.startswith(w[1:]) if w[0] == "^" else w in text for w in words)


@pytest.mark.parametrize("name", [name for name, *_ in NAMES])
def test_queries_find_the_name_they_come_from(name: str) -> None:
    place = place_of(name)
    assert matches(name, place.role_query)
    if place.layer is not None:
        assert matches(name, place.layer_query)


def test_queries_tell_layers_and_roles_apart() -> None:
    place = place_of("model.layers.1.mlp.gate.weight")
    assert not matches("model.layers.11.mlp.gate.weight", place.layer_query)
    assert matches("model.layers.11.mlp.gate.weight", place.role_query)
    assert not matches("model.layers.1.mlp.gate_proj.weight", place.role_query)
    expert = place_of("layers.2.mlp.experts.7.w1.weight")
    assert matches("layers.5.mlp.experts.0.w1.weight", expert.role_query)
    assert not matches("layers.5.mlp.experts.0.w2.weight", expert.role_query)


@given(st.text(st.sampled_from("ab.0179*+[] é²٣"), max_size=20))
def test_any_name_has_a_place(name: str) -> None:
    place = place_of(name)
    assert (place.layer is None) <= (place.stack == "")
    assert place.role or not name.strip(".")
