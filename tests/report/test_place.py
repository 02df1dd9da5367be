"""Layer and role, read from parameter names as models have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.report.granularity_map import place_of

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
