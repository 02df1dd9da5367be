"""Shapes from configs: parameters as transformers itself counts them, and as published; every
wrong config is refused with its file and key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fqcompile.errors import EstimateError
from fqcompile.estimator.model_shapes import FAMILIES, named_models, read_decoder
from tests.estimator.shapes import LLAMA, MIXTRAL, decoder
from tests.tiers import examples

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "vocab_size": 128,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
SPARSE = {**SMALL, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT = {
    "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "word_embed_proj_dim": 64, "vocab_size": 128, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 32}
# model_type, the class in transformers, what the config has
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "Llama", SMALL),
    ("llama", "Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    ("llama", "Llama", {**SMALL, "tie_word_embeddings": True}),
    ("mistral", "Mistral", {**SMALL, "head_dim": 16}),
    ("qwen2", "Qwen2", SMALL),
    ("qwen3", "Qwen3", {**SMALL, "head_dim": 32}),
    ("mixtral", "Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("olmoe", "Olmoe", {**SMALL, "num_experts": 4, "num_experts_per_tok": 2}),
    ("qwen2_moe", "Qwen2Moe", {**SPARSE, "shared_expert_intermediate_size": 48}),
    ("qwen3_moe", "Qwen3Moe", {**SPARSE, "head_dim": 32}),
    ("qwen3_moe", "Qwen3Moe", {**SPARSE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("opt", "OPT", OPT),
    ("opt", "OPT", {**OPT, "tie_word_embeddings": False}),
    ("gpt2", "GPT2", GPT2),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "sizes"), MODELS, ids=lambda value: str(value)[:20])
def test_parameters_are_those_that_transformers_makes(
    kind: str, name: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config = getattr(transformers, f"{name}Config")(**sizes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = read_decoder(str(tmp_path))
    assert shape.model_type == kind
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert read_decoder(str(tmp_path / "config.json")) == shape


def test_every_family_is_compared() -> None:
    assert {kind for kind, _, _ in MODELS} == set(FAMILIES)


# As their makers call them: billions of parameters, and of those that a token meets.
PUBLISHED = {"opt-175b": (175, 175), "llama-3-70b": (70.6, 70.6), "qwen3-235b-a22b": (235, 22)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_have_the_published_size(name: str) -> None:
    shape = read_decoder(name)
    total, active = PUBLISHED[name]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.003)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.01)
    assert set(named_models()) == set(PUBLISHED)


def test_the_config_of_a_named_model_is_transformers_own() -> None:
    """The packaged facts make a model of transformers of exactly so many parameters."""
    for name, kind in (("opt-175b", "OPT"), ("llama-3-70b", "Llama")):
        content = json.loads(
            (Path(__file__).parents[2] / "fqcompile/estimator/named_models" / f"{name}.json")
            .read_text(encoding="utf-8")
        )  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(**content)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert read_decoder(name).parameters == sum(p.numel() for p in model.parameters())


def test_unknown_and_incomplete_configs_say_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    cases: list[tuple[str, str]] = [
        ('{"model_type": "deepseek_v3"}', "the model_type 'deepseek_v3'"),
        ("{}", "lacks model_type"),
        ('{"model_type": ["llama"]}', "model_type ['llama']"),
        ('{"model_type": "opt", "hidden_size": 8}', "lacks ffn_dim, num_hidden_layers"),
        ("[1]", "holds a list"),
        ("{", "is not JSON"),
        (json.dumps({**LLAMA, "hidden_size": "8"}), "hidden_size is '8'"),
        (json.dumps({**LLAMA, "num_hidden_layers": 0}), "num_hidden_layers is 0"),
        (json.dumps({**LLAMA, "vocab_size": True}), "vocab_size is True"),
        (json.dumps({**LLAMA, "num_key_value_heads": 3}), "num_key_value_heads is 3"),
        (json.dumps({**LLAMA, "num_attention_heads": 7}), "must divide"),
        (json.dumps({**LLAMA, "tie_word_embeddings": 1}), "tie_word_embeddings is 1"),
        (json.dumps({**MIXTRAL, "num_experts_per_tok": 9}), "num_experts_per_tok is 9"),
    ]
    for text, expected in cases:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(EstimateError) as caught:
            read_decoder(str(path))
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)
    with pytest.raises(EstimateError, match=r"neither a config\.json.*opt-175b"):
        read_decoder(str(tmp_path / "nothing"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(EstimateError, match="cannot be read"):
        read_decoder(str(path))


values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**12), st.floats(), st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=2),
)  # fmt: skip


@settings(max_examples=examples(150))
@given(st.sampled_from([LLAMA, MIXTRAL]), st.data())
def test_a_fuzzed_config_is_read_or_refused_by_name(
    base: dict[str, Any], data: st.DataObject
) -> None:
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(base)), values, min_size=1))
    try:
        shape = decoder(base, **changed)
    except EstimateError as error:
        text = str(error)
        assert text.startswith("config.json")
        assert any(name in text for name in (*base, "head_dim"))
    else:
        assert shape.parameters > 0
        assert shape.heads % shape.kv_heads == 0
