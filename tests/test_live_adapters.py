"""Adapters on a compiled dense base: switched, scaled, merged, swapped; the output follows."""

import ast
import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.config import ADAPTER, ADAPTER_NAMES, FineQuantConfig, SiteOptions
from fqcompile.quant.choose import choose_and_quantize
from tests.dense_models import build
from tests.helpers import assert_close, finequant, frozen

peft = pytest.importorskip("peft", reason="the dev extra is not installed")
OPTIONS: dict[str, Any] = {"calibration": None, "granularity": 64, "min_elements": 1024}


def _adapted() -> tuple[Any, Tensor]:
    """Two adapters whose factors are large enough to be quantized, were they ordinary weights."""
    model, inputs = build("llama", torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    adapted = peft.get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    adapted.set_adapter("one")
    return frozen(adapted), inputs["input_ids"]


def _expected(model: Any, ids: Tensor) -> Tensor:
    """Each base weight dequantized as it is now, and the adapters in full."""
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in expected.named_modules():
            if isinstance(module, nn.Linear) and ".lora_" not in name:
                options = SiteOptions(granularity=64, bits=8 if "lm_head" in name else 4)
                _, codes = choose_and_quantize(module.weight, options, torch.float16)
                module.weight.copy_(codes.dequantize(torch.float32))
        logits: Tensor = expected(input_ids=ids).logits
    return logits


def _check(model: Any, run: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        actual: Tensor = run(input_ids=ids).logits
        assert_close(actual, _expected(model, ids), depth=20)
        dense = model(input_ids=ids).logits
    assert (actual - dense).norm() > 1e-3 * dense.norm(), "nothing is quantized"
    return actual


def test_factors_are_kept_and_the_base_is_not() -> None:
    model, ids = _adapted()
    with torch.no_grad():
        finequant(model, **OPTIONS)(input_ids=ids)
        explained = fqcompile.explain(model, example_kwargs={"input_ids": ids}, **OPTIONS)
    packed = fqcompile.quantize_(model, **OPTIONS)
    for plan in (fqcompile.reports()[0].plan, explained, packed):
        factors = [site for site in plan.sites if ".lora_" in site.name and ".one." in site.name]
        others = [site for site in plan.quantized if ".lora_" not in site.name]
        assert len(factors) >= 8 and len(others) >= 15
        assert all(site.status == "kept" for site in factors)
        # Where the name in the graph is not that of named_parameters(), there are two rows.
        reasons = [site.reason for site in factors if "no captured graph" not in str(site.reason)]
        assert len(reasons) >= 8 and set(reasons) == {ADAPTER}


def _switch(model: Any, _: Path) -> None:
    model.set_adapter("two")
    model.requires_grad_(False)


def _scale(model: Any, _: Path) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 3.0)


def _hotswap(model: Any, path: Path) -> None:
    hotswap = importlib.import_module("peft.utils.hotswap").hotswap_adapter
    hotswap(model, str(path / "two"), adapter_name="one")


def _merge(model: Any, _: Path) -> None:
    model.merge_adapter()


@pytest.mark.few(2)
@pytest.mark.parametrize("change", [_switch, _scale, _hotswap, _merge])
def test_a_compiled_model_follows_its_adapters(change: Any, tmp_path: Path) -> None:
    model, ids = _adapted()
    model.save_pretrained(tmp_path)
    run = finequant(model, fullgraph=False, **OPTIONS)
    before = _check(model, run, ids)
    change(model, tmp_path)
    after = _check(model, run, ids)
    difference = (after - before).norm() / before.norm()
    assert difference > 0.02 or (change is _merge and difference > 1e-4)


@pytest.mark.slow
def test_merged_unmerged_and_merged_again_with_another() -> None:
    """Each time another graph of the two runs, and finds by content what it had bound changed."""
    model, ids = _adapted()
    run = finequant(model, fullgraph=False, **OPTIONS)
    for name in ("one", "two", "one"):
        _check(model, run, ids)
        _check(model, run, ids)
        model.set_adapter(name)
        model.requires_grad_(False)
        model.merge_adapter()
        _check(model, run, ids)
        _check(model, run, ids)
        model.unmerge_adapter()


@pytest.mark.few(1)
@pytest.mark.parametrize("reset", [False, True])
def test_merged_and_unloaded_models_compile_anew_with_what_they_hold(reset: bool) -> None:
    """The base weights keep identity, address and version through the merge."""
    model, ids = _adapted()
    _check(model, finequant(model, **OPTIONS), ids)
    merged = model.merge_and_unload()
    if reset:
        torch._dynamo.reset()
    _check(merged, finequant(merged, **OPTIONS), ids)


@pytest.mark.parametrize("weight_updates", ["detect", "ignore"])
def test_refresh_after_writes_that_nothing_shows(weight_updates: str) -> None:
    model, inputs = build("llama", torch.float32)
    ids = inputs["input_ids"]
    run = finequant(model, weight_updates=weight_updates, **OPTIONS)
    before = _check(model, run, ids)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(1.5)
    with torch.no_grad():
        assert torch.equal(run(input_ids=ids).logits, before)
    fqcompile.refresh(model)
    _check(model, run, ids)


def test_refresh_leaves_other_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [build("llama", torch.float32) for _ in range(2)]
    runs = [finequant(model, **OPTIONS) for model, _ in models]
    for run, (_, inputs) in zip(runs, models, strict=True):
        run(**inputs)
    fqcompile.refresh(models[0][0])
    monkeypatch.setattr("fqcompile.weights.store.WeightStore._get", None)
    runs[1](**models[1][1])
    with pytest.raises(TypeError):
        runs[0](**models[0][1])


def test_refresh_wants_a_module() -> None:
    with pytest.raises(
        fqcompile.FineQuantError,
        match=r"refresh got <function .* in place of a model; give an nn\.Module",
    ):
        fqcompile.refresh(lambda x: x)  # type: ignore[arg-type]


def test_an_adapter_is_quantized_where_a_pattern_names_it() -> None:
    name = "base_model.model.layers.0.q_proj.lora_A.default.weight"
    assert FineQuantConfig().kept_by_name(name) == ADAPTER
    for about_others in ("q_proj", r"layers\.0", "weight$", "^base_model"):
        assert FineQuantConfig(include=[about_others]).kept_by_name(name) == ADAPTER
        assert FineQuantConfig(overrides={about_others: {}}).kept_by_name(name) == ADAPTER
    for about_it in ("lora_", "lora_A", r"q_proj\.lora", ".*", "A.default"):
        assert FineQuantConfig(include=[about_it]).kept_by_name(name) is None
        assert FineQuantConfig(overrides={about_it: {"bits": 8}}).kept_by_name(name) is None
    excluded = FineQuantConfig(include=["lora_"], exclude=["lora_A"]).kept_by_name(name)
    assert excluded == "name matches exclude pattern 'lora_A'"


def _names_in_peft() -> Iterator[tuple[str, str]]:
    """What each tuner says its trainable layers are called, and its prefix."""
    (tuners,) = (Path(place) / "tuners" for place in peft.__path__)
    for path in sorted(tuners.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Tuple):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name) and target.id == "adapter_layer_names":
                    yield from ((path.parent.name, name) for name in ast.literal_eval(node.value))


def test_all_factors_of_peft_are_known_by_name() -> None:
    found = list(_names_in_peft())
    assert len({tuner for tuner, _ in found}) > 25
    modules = {"shadow_dropout"}  # has no parameters
    unknown = [
        (tuner, name)
        for tuner, name in found
        if not ADAPTER_NAMES.search(f"base.q_proj.{name}.default.weight") and name not in modules
    ]
    assert not unknown


@pytest.mark.parametrize(
    "name",
    """lm_head.weight model.layers.0.self_attn.q_proj.base_layer.weight blocks.0.w_lora.0.weight
    attn.kv_a_proj.weight veranda.weight oversight.oft.weight poly.fc.weight shadow_net.fc.weight
    road_head.fc.weight mission_block.weight deft_head.weight""".split(),
)
def test_other_weights_are_not_taken_for_factors(name: str) -> None:
    assert ADAPTER_NAMES.search(name) is None
