"""What the names of transformers are used for, each tried on the release that is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf

from fqcompile import hf_compat as compat
from tests import dense_models, moe_models


def test_converters_and_renamings_of_a_model() -> None:
    model = moe_models.build("mixtral", torch.float32, "eager")
    entries = compat.conversion_mapping(model)
    kinds = (compat.loading().WeightConverter, compat.loading().WeightRenaming)
    assert entries and all(isinstance(entry, kinds) for entry in entries)
    converters = [entry for entry in entries if isinstance(entry, kinds[0])]
    assert any("experts" in pattern for c in converters for pattern in c.source_patterns)
    names = sorted(["a.10", "a.9"], key=compat.loading().dot_natural_key)
    assert names == ["a.9", "a.10"]


def test_names_of_converters_and_renamings() -> None:
    loading = compat.loading()
    renamings = [loading.WeightRenaming("old", "new"), loading.WeightRenaming("new.a", "new.b")]
    assert compat.renamed("x.old.a", renamings) == "x.new.b"
    assert compat.renamed("x.other", renamings) == "x.other"
    chunk = loading.Chunk(dim=0)
    converters = [
        loading.WeightConverter("up", ["u", "v"], [chunk]),
        loading.WeightConverter("u", ["a", "b"], [chunk]),
    ]
    assert compat.converted_name("x.up", converters) == ("x.u", "up")
    assert compat.converted_name("x.down", converters) == ("x.down", None)


def test_a_model_is_built_without_values() -> None:
    config = dense_models.build("llama", torch.float32)[0].config.to_dict()
    with torch.device("meta"), compat.meta_safe():
        model = compat.model_from_config(hf.LlamaForCausalLM, config, dtype=torch.bfloat16)
    assert compat.is_model_class(hf.LlamaForCausalLM) and not compat.is_model_class(hf.LlamaConfig)
    assert model.lm_head.weight.is_meta and model.lm_head.weight.dtype == torch.bfloat16
    missing, unexpected = compat.ignored_names(model)
    assert all(isinstance(pattern, str) for own in (missing, unexpected) for pattern in own or ())


def test_infinities_of_a_config_are_read() -> None:
    config = {**hf.MambaConfig().to_dict(), "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    with torch.device("meta"), compat.meta_safe():
        model = compat.model_from_config(hf.MambaForCausalLM, {**config, **sizes})
    assert list(model.config.time_step_limit) == [0.0, float("inf")]


def test_what_a_checkpoint_lacks_is_computed() -> None:
    config = dense_models.build("llama", torch.float32)[0].config.to_dict()
    with torch.device("meta"), compat.meta_safe():
        model = compat.model_from_config(hf.LlamaForCausalLM, config)
    compat.move_missing(model, {"lm_head.weight"})
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":
            compat.mark_initialized(parameter)
    compat.initialize_missing(model)
    assert not model.lm_head.weight.is_meta and model.lm_head.weight.abs().max() > 0
    assert not model.model.rotary_emb.inv_freq.is_meta


def test_types_that_models_keep() -> None:
    t5 = dense_models.build("t5", torch.float32)[0]
    assert any("wo" in pattern for pattern in compat.kept_types(t5, torch.float16))
    llama = dense_models.build("llama", torch.float32)[0]
    assert not compat.kept_types(llama, torch.float16)


def test_which_models_switch_their_experts() -> None:
    assert compat.can_switch_experts(hf.MixtralForCausalLM) is True
    assert compat.can_switch_experts(hf.DbrxForCausalLM) is False
    assert compat.can_switch_experts(torch.nn.Linear) is None


def test_what_is_apart_is_no_longer_tied() -> None:
    model: Any = dense_models.build("t5", torch.float32)[0]
    ties = dict(model.all_tied_weights_keys)
    compat.untie(model)
    assert model.all_tied_weights_keys == ties and "_tied_weights_keys" not in vars(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    compat.untie(model)
    model.tie_weights()
    assert ties.pop("lm_head.weight") == "shared.weight" and ties
    assert model.all_tied_weights_keys == model.get_expanded_tied_weights_keys() == ties
    assert model.lm_head.weight is not model.shared.weight is model.encoder.embed_tokens.weight


def test_what_a_model_is_told_for_its_files(tmp_path: Path) -> None:
    model: Any = moe_models.build("mixtral", torch.float32, "eager")
    compat.save_by_own_names(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == model.state_dict().keys() and any("gate_up_proj" in name for name in names)
    tensors = {**model.state_dict(), "model.rotary_emb.cos": torch.ones(2), "other": torch.ones(2)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")

    class Told(hf.MixtralForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            compat.ignore_unexpected(self, ["model.rotary_emb.cos"])

    _, info = Told.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"other"} and not info["missing_keys"]
