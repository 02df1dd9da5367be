"""Expressions for names of layers: they match all that they are for, fused or not, and no other."""

import re

from hypothesis import given
from hypothesis import strategies as st

from fqcompile.interop.export_config import quantization_config, target_patterns
from fqcompile.interop.layers import Scheme

OWN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
EXPERTS = [f"mlp.experts.{e}.{p}" for e in (0, 10) for p in ("gate_proj", "down_proj")]
PREFIXES = ["model.layers", "layers", "model.vision_tower.encoder.layers", "transformer.h"]
NAMES = [f"{p}.{i}.{own}" for p in PREFIXES for i in (0, 1, 10, 11) for own in OWN + EXPERTS]
NAMES += ["lm_head", "model.projector.linear_1", "visual.merger.mlp.0", "visual.merger.mlp.2"]


def unit(name: str) -> str:
    """Experts of a stack go together."""
    return re.sub(r"experts\..*", "experts", name)


def matched(patterns: list[str], name: str) -> bool:
    assert all(p.startswith("re:") for p in patterns)
    return any(re.match(p[3:], name) for p in patterns)


@given(chosen=st.sets(st.sampled_from(sorted({unit(n) for n in NAMES})), min_size=1))
def test_patterns_match_the_chosen_layers_and_no_others(chosen: set[str]) -> None:
    wanted = [name for name in NAMES if unit(name) in chosen]
    others = [name for name in NAMES if unit(name) not in chosen]
    patterns = target_patterns(wanted, others)
    assert [n for n in wanted if not matched(patterns, n)] == []
    assert [n for n in others if matched(patterns, n)] == []


def test_fused_names_and_the_prefixes_of_engines_match_too() -> None:
    wanted = [f"model.layers.{i}.{own}" for i in (1, 3) for own in OWN]
    others = [f"model.layers.{i}.{own}" for i in (0, 2, 11, 13, 31) for own in OWN]
    patterns = target_patterns(wanted, others)
    assert len(patterns) == 2, patterns
    for prefix in ("model.layers", "language_model.model.layers", "model.language_model.layers"):
        for own in (*OWN, "self_attn.qkv_proj", "mlp.gate_up_proj"):
            assert matched(patterns, f"{prefix}.3.{own}")
            assert not matched(patterns, f"{prefix}.2.{own}")
            assert not matched(patterns, f"{prefix}.31.{own}")
            assert not matched(patterns, f"{prefix}.3.{own}_other")


def test_a_stack_of_experts_matches_by_any_name_inside_it() -> None:
    wanted = [f"model.layers.3.mlp.experts.{e}.w1" for e in range(20)]
    patterns = target_patterns(wanted, ["model.layers.3.mlp.shared_experts.gate_proj"])
    assert len(patterns) == 1
    assert "experts" in patterns[0]
    for name in ("mlp.experts", "mlp.experts.0.gate_proj", "mlp.experts.7.w2"):
        assert matched(patterns, f"model.layers.3.{name}")
    assert not matched(patterns, "model.layers.3.mlp.experts_of_another.0.w1")


def test_ignore_has_the_names_of_dense_layers_that_are_fused() -> None:
    """SGLang's Llama looks for these alone."""
    dense = [f"model.layers.0.{own}" for own in OWN[:3]]
    schemes = {f"model.layers.0.{own}": Scheme(4, 128) for own in OWN[3:]}
    ignored = quantization_config(schemes, dense, {})["ignore"]
    assert ignored == sorted([*dense, "model.layers.0.self_attn.qkv_proj"])
