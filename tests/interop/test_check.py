"""The checker against a table of checkpoints: every failure is found, with its remedy; no other.

What each engine does is in the source of vLLM 0.33, SGLang 0.5.23 and transformers 5.23, or was
seen there; the cases are those failures, and checkpoints that load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import fqcompile
from fqcompile.cli import main
from fqcompile.errors import CheckpointError, OptionError
from fqcompile.interop import expert_rules
from fqcompile.interop.check import find_problems
from fqcompile.interop.layers import Layer, Scheme, last
from tests.interop.checkpoints import (
    HEAD,
    HIDDEN,
    INT4,
    INT8,
    changed,
    config,
    dense_model,
    mixtral,
    moe_model,
    write,
)

ALL = ("vllm", "sglang", "transformers")
SERVERS = ("vllm", "sglang")
ROUTERS, MIXTRAL_ROUTERS = "re:.*mlp.gate$", "re:.*moe.gate$"
ATTENTION = r"re:.*self_attn\.(q|k|v|qkv|o)_proj$"
MLPS = r"re:.*mlp\.(gate|up|gate_up|down)_proj$"
EXPERTS = r"re:.*mlp\.experts\..*$"
PROJECTIONS = r"re:.*experts\.\d+\.(gate|up|down)_proj$"
QKV = r"re:.*self_attn\.(q|k|v|qkv)_proj$"


@dataclass(frozen=True)
class Bad:
    """A checkpoint, and what each engine makes of it: (rule, effect), a layer, a remedy."""

    config: Any
    layers: list[Layer]
    found: dict[str, tuple[str, str]]
    layer: str
    remedy: str
    tp: int = 1
    ep: int = 1


def everywhere(rule: str, effect: str, engines: Sequence[str] = ALL) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(engines, (rule, effect))


def with_top_level(content: Any, **changes: Any) -> Any:
    return {**content, **changes}


def with_quantization(content: Any, **changes: Any) -> Any:
    return {**content, "quantization_config": {**content["quantization_config"], **changes}}


GROUP64, CHANNEL, ASYMMETRIC = Scheme(4, 64), Scheme(4, None), Scheme(4, 128, False)
ONE_K = r"re:.*layers\.1\.self_attn\.k_proj$"
WIDE = Layer("model.layers.0.mlp.down_proj", HIDDEN, 1536, INT4)

BAD = {
    "fused shards of different group sizes": Bad(
        config(([ONE_K], GROUP64), ([QKV, ATTENTION, MLPS], INT4)),
        changed(dense_model(), "layers.1.self_attn.k_proj", GROUP64),
        everywhere("fused-parts", "refused", SERVERS),
        "model.layers.1.self_attn.k_proj", "give all of them one scheme",
    ),
    "fused shards of different bits": Bad(
        config(([r"re:.*up_proj$"], INT8), ([ATTENTION, MLPS], INT4)),
        changed(dense_model(), "mlp.up_proj", INT8),
        everywhere("fused-parts", "refused", SERVERS)
        | {"transformers": ("other-target", "refused")},
        "model.layers.0.mlp.up_proj", "",
    ),
    "fused shards with and without zero points": Bad(
        config(([r"re:.*\.gate_proj$"], ASYMMETRIC),
               ([r"re:.*\.(up|down)_proj$", ATTENTION], INT4)),
        changed(dense_model(), "gate_proj", ASYMMETRIC),
        everywhere("fused-parts", "wrong", SERVERS) | {"transformers": ("asymmetric", "refused")},
        "model.layers.0.mlp.gate_proj", "",
    ),
    "a fused shard left dense": Bad(
        config((["Linear"], INT4), ignore=["lm_head", "model.layers.2.self_attn.v_proj"]),
        changed(dense_model(), "layers.2.self_attn.v_proj", None),
        {"vllm": ("fused-parts", "refused"), "sglang": ("fused-parts", "wrong")},
        "model.layers.2.self_attn.v_proj", "give all of them one scheme",
    ),
    "a fused shard ignored though packed": Bad(
        config((["Linear"], INT4), ignore=["lm_head", "model.layers.2.self_attn.v_proj"]),
        dense_model(),
        everywhere("ignored-parts", "refused", SERVERS) | {"transformers": ("ignored", "wrong")},
        "model.layers.2.self_attn.v_proj", "ignore",
    ),
    "K per shard no multiple of the group": Bad(
        config(([ATTENTION, MLPS], INT4)), dense_model(),
        everywhere("tp-splits-groups", "refused", SERVERS),
        "model.layers.0.self_attn.o_proj", "repeat the scales to group 64", tp=8,
    ),
    "K per shard of experts no multiple of the group": Bad(
        config(([ATTENTION], CHANNEL), ([EXPERTS], INT4), ignore=["lm_head", ROUTERS]),
        moe_model(CHANNEL, INT4), everywhere("tp-splits-groups", "refused", SERVERS),
        "model.layers.0.mlp.experts", "or take a smaller --tp or expert parallelism", tp=16,
    ),
    "experts that expert parallelism does not divide": Bad(
        config((["Linear"], INT4), ignore=["lm_head", ROUTERS]), moe_model(),
        everywhere("ep-splits-experts", "refused", SERVERS),
        "model.layers.0.mlp.experts", "that divides them", ep=3,
    ),
    "N that tensor parallelism does not divide": Bad(
        config(([ATTENTION, MLPS], CHANNEL)), dense_model(CHANNEL),
        everywhere("tp-splits-n", "refused", SERVERS),
        "model.layers.0.self_attn.q_proj", "another degree", tp=3,
    ),
    "a class name as target beside others": Bad(
        config((["Linear"], INT4), ([QKV.replace("|qkv", "")], GROUP64)),
        [replace(x, scheme=GROUP64) if x.name[-6:] in ("q_proj", "k_proj", "v_proj") else x
         for x in dense_model()],
        {"sglang": ("class-target", "refused")},
        "model.layers.0.self_attn.q_proj", "not class names",
    ),
    "a regular expression without an end": Bad(
        config(([r"re:model\.layers\.1.*o_proj"], GROUP64),
               ([r"re:model\.layers\.\d+\.self_attn.*$", MLPS], INT4)),
        changed(dense_model(layers=11), "layers.1.self_attn.o_proj", GROUP64),
        everywhere("other-target", "refused") | {"sglang": ("other-target", "wrong")},
        "model.layers.10.self_attn.o_proj", "end in $",
    ),
    "a fused layer whose first part has another target": Bad(
        config(([r"re:.*\.q_proj$"], GROUP64), ([r"re:.*\.[kvo]_proj$", MLPS], INT4)),
        dense_model(),
        everywhere("other-target", "refused"),
        "model.layers.0.self_attn.q_proj", "match the fused name",
    ),
    "packed and no target": Bad(
        config(([ATTENTION], INT4)), dense_model(),
        everywhere("no-target", "wrong") | everywhere("no-target", "refused", SERVERS),
        "model.layers.0.mlp.gate_proj", "add a regular expression that also matches the fused name",
    ),
    "dense and not ignored": Bad(
        config((["Linear"], INT4)), changed(dense_model(), "1.mlp.down_proj", None),
        everywhere("not-ignored", "wrong") | {"vllm": ("not-ignored", "refused")},
        "model.layers.1.mlp.down_proj", "name it in ignore",
    ),
    "dense and in no list": Bad(
        config(([QKV, MLPS], INT4)), changed(dense_model(), "o_proj", None),
        {"sglang": ("unlisted", "refused")}, "model.layers.0.self_attn.o_proj", "name it in ignore",
    ),
    "attention-only quantization of an MoE": Bad(
        config(([ATTENTION], INT4), ignore=["lm_head", ROUTERS, EXPERTS]),
        moe_model(experts=None), {"transformers": ("dense-experts", "refused")},
        "model.layers.0.mlp.experts", "--profile serve",
    ),
    "mixed bits among the experts of a layer": Bad(
        config(([r"re:.*experts\.2\..*$"], INT8), ([EXPERTS, ATTENTION], INT4),
               ignore=["lm_head", ROUTERS]),
        [replace(x, scheme=INT8) if ".experts.2." in x.name else x for x in moe_model()],
        everywhere("experts-differ", "refused", SERVERS)
        | {"transformers": ("experts-of-one-scheme", "refused")},
        "model.layers.0.mlp.experts", "one scheme",
    ),
    "projections of an MoE layer with different groups": Bad(
        config(([r"re:.*experts\..*\.down_proj$"], GROUP64), ([EXPERTS, ATTENTION], INT4),
               ignore=["lm_head", ROUTERS]),
        [replace(x, scheme=GROUP64) if x.name.endswith("down_proj") else x for x in moe_model()],
        everywhere("experts-differ", "refused", SERVERS)
        | {"transformers": ("experts-of-one-scheme", "refused")},
        "model.layers.0.mlp.experts", "one scheme",
    ),
    "mixed bits among the experts of different layers": Bad(
        config(([r"re:.*layers\.1\.mlp\.experts\..*$"], INT8),
               ([r"re:.*layers\.(0|2)\.mlp\.experts\..*$", ATTENTION], INT4),
               ignore=["lm_head", ROUTERS]),
        [replace(x, scheme=INT8) if ".1.mlp.experts." in x.name else x for x in moe_model()],
        {"transformers": ("experts-of-one-scheme", "refused")},
        "model.layers.0.mlp.experts", "--profile portable",
    ),
    "mixed groups among the experts of different layers": Bad(
        config(([r"re:.*layers\.1\.mlp\.experts\..*$"], GROUP64),
               ([r"re:.*layers\.(0|2)\.mlp\.experts\..*$", ATTENTION], INT4),
               ignore=["lm_head", ROUTERS]),
        [replace(x, scheme=GROUP64) if ".1.mlp.experts." in x.name else x for x in moe_model()],
        {"transformers": ("experts-of-one-scheme", "refused")},
        "model.layers.0.mlp.experts", "in a group of their own",
    ),
    "experts whose group is not found by its targets": Bad(
        config(([r"re:.*self_attn\..*$"], INT8), ([r"re:.*mlp\.e.*$"], INT4),
               ignore=["lm_head", ROUTERS]),
        moe_model(INT8, INT4), {"transformers": ("experts-of-one-scheme", "refused")},
        "model.layers.0.mlp.experts", "a regular expression with 'experts'",
    ),
    "experts of which no projection matches": Bad(
        config(([ATTENTION], INT4), ignore=["lm_head", ROUTERS]), moe_model(),
        everywhere("experts-target", "refused", SERVERS),
        "model.layers.0.mlp.experts", r"re:.*experts\..*",
    ),
    "experts by names that SGLang does not look up": Bad(
        config(([r"re:.*experts\.\d+\.w[123]$", ATTENTION], INT4),
               ignore=["lm_head", MIXTRAL_ROUTERS]),
        mixtral(moe_model()), {"sglang": ("experts-target", "refused")},
        "model.layers.0.block_sparse_moe.experts", r"re:.*experts\..*",
    ),
    "experts by names that vLLM does not look up": Bad(
        config(([PROJECTIONS, ATTENTION], INT4), ignore=["lm_head", MIXTRAL_ROUTERS]),
        mixtral(moe_model()), {"vllm": ("experts-target", "refused")},
        "model.layers.0.block_sparse_moe.experts", r"re:.*experts\..*",
    ),
    "experts of Mixtral by the names of others": Bad(
        with_top_level(config(([PROJECTIONS, ATTENTION], INT4),
                              ignore=["lm_head", MIXTRAL_ROUTERS]), model_type="mixtral"),
        [replace(x, name=x.name.replace("mlp", "block_sparse_moe")) for x in moe_model()],
        {"vllm": ("experts-target", "refused"), "sglang": ("experts-names", "wrong"),
         "transformers": ("experts-names", "wrong")},
        "model.layers.0.block_sparse_moe.experts", "",
    ),
    "class names in ignore": Bad(
        config(([ATTENTION, MLPS], INT4), ignore=["lm_head", "Linear"]), dense_model(),
        {"transformers": ("ignored", "wrong")}, "model.layers.0.mlp.up_proj", "ignore",
    ),
    "a packed layer that ignore names": Bad(
        config((["Linear"], INT4), ignore=["lm_head", r"re:.*1\.self_attn\.o_proj$"]),
        dense_model(), everywhere("ignored", "wrong") | {"vllm": ("ignored", "refused")},
        "model.layers.1.self_attn.o_proj", "take it out of ignore",
    ),
    "packed experts that ignore names": Bad(
        config(([ATTENTION, EXPERTS], INT4), ignore=["lm_head", ROUTERS, EXPERTS]), moe_model(),
        {"vllm": ("experts-target", "refused"), "sglang": ("experts-target", "wrong")},
        "model.layers.0.mlp.experts", "",
    ),
    "a fused layer ignored by its own name alone": Bad(
        config((["Linear"], INT4), ignore=["lm_head", "re:.*qkv_proj$", r"re:.*1.*\.q_proj$"]),
        [replace(x, scheme=None) if x.name[-6:] in ("q_proj", "k_proj", "v_proj") else x
         for x in dense_model()],
        {"sglang": ("not-ignored", "wrong"), "transformers": ("not-ignored", "wrong")},
        "model.layers.0.self_attn.k_proj", "name it in ignore",
    ),
    "a fused layer of which one part matches a target": Bad(
        config(([r"re:.*(q|k)_proj$", r"re:.*o_proj$", MLPS], INT4)), dense_model(),
        everywhere("no-target", "refused", SERVERS) | {"transformers": ("no-target", "wrong")},
        "model.layers.0.self_attn.v_proj", "matches the fused name",
    ),
    "experts under a target of linears": Bad(
        config((["Linear"], INT8), ignore=["lm_head", ROUTERS]), moe_model(INT8, INT4),
        everywhere("experts-target", "refused", SERVERS)
        | {"transformers": ("experts-of-one-scheme", "refused")},
        "model.layers.0.mlp.experts", "a group of their own",
    ),
    "asymmetric experts": Bad(
        config((["Linear"], ASYMMETRIC), ignore=["lm_head", ROUTERS]),
        moe_model(ASYMMETRIC, ASYMMETRIC),
        {"sglang": ("experts-asymmetric", "refused"),
         "transformers": ("experts-asymmetric", "refused")},
        "model.layers.0.mlp.experts", "symmetrically",
    ),
    "asymmetric int4 without experts": Bad(
        config((["Linear"], ASYMMETRIC)), dense_model(ASYMMETRIC),
        {"transformers": ("asymmetric", "refused")}, "model.layers.0.mlp.up_proj", "symmetrically",
    ),
    "asymmetric int8": Bad(
        config((["Linear"], Scheme(8, 128, False))), dense_model(Scheme(8, 128, False)),
        everywhere("asymmetric", "refused"), "model.layers.0.mlp.up_proj", "symmetrically",
    ),
    "a tied quantized head": Bad(
        with_top_level(config((["Linear"], INT4), ignore=[]), tie_word_embeddings=True),
        [*dense_model()[:-1], replace(HEAD, scheme=INT4)],
        everywhere("tied-head", "wrong") | {"transformers": ("tied-head", "refused")},
        "lm_head", "leave the head dense",
    ),
    "a head tied by the config of the language model": Bad(
        {**{k: v for k, v in config((["Linear"], INT4), ignore=[]).items()
            if k != "tie_word_embeddings"}, "text_config": {"tie_word_embeddings": True}},
        [*dense_model()[:-1], replace(HEAD, scheme=INT4)],
        everywhere("tied-head", "wrong") | {"transformers": ("tied-head", "refused")},
        "lm_head", "tie_word_embeddings",
    ),
    "an untied quantized head that only a class names": Bad(
        config((["Linear"], INT4), ignore=[]), [*dense_model()[:-1], replace(HEAD, scheme=INT4)],
        {"vllm": ("no-target", "refused"), "sglang": ("no-target", "wrong")},
        "lm_head", "matches the fused name",
    ),
    "a quantized embedding": Bad(
        config((["Linear", "re:.*embed_tokens$"], INT4)),
        [*dense_model(), Layer("model.embed_tokens", 1000, HIDDEN, INT4)],
        everywhere("embedding", "refused") | {"sglang": ("embedding", "wrong")},
        "model.embed_tokens", "leave it dense",
    ),
    "a quantized router": Bad(
        config((["Linear"], INT4)), changed(moe_model(), "mlp.gate", INT4),
        everywhere("router", "wrong") | {"vllm": ("router", "refused")},
        "model.layers.0.mlp.gate", "leave it dense",
    ),
    "a group size without a kernel": Bad(
        config((["Linear"], Scheme(4, 256))), dense_model(Scheme(4, 256)),
        everywhere("group-size", "refused", SERVERS),
        "model.layers.0.mlp.up_proj", "repeat the scales to 128",
    ),
    "K that is not a multiple of the group": Bad(
        config((["Linear"], INT4)), dense_model(inner=600),
        everywhere("group-divides-k", "refused"),
        "model.layers.0.mlp.down_proj", "that divides 600",
    ),
    "K that fills no words": Bad(
        config((["Linear"], CHANNEL)), dense_model(CHANNEL, inner=601),
        everywhere("words", "refused", SERVERS),
        "model.layers.0.mlp.down_proj", "leave the layer dense",
    ),
    "bits without a kernel": Bad(
        config((["Linear"], Scheme(3, 128))), dense_model(Scheme(3, 128)),
        everywhere("bits", "refused", SERVERS), "model.layers.0.mlp.up_proj", "4 or 8 bits",
    ),
    "another format": Bad(
        with_quantization(config((["Linear"], INT4)), format="int-quantized"), dense_model(),
        everywhere("format", "refused"), "model.layers.0.mlp.up_proj", "pack-quantized",
    ),
    "mixed formats": Bad(
        with_quantization(config((["Linear"], INT4)), format="mixed-precision"), dense_model(),
        everywhere("format", "refused"), "model.layers.0.mlp.up_proj", "pack-quantized",
    ),
    "nothing packed": Bad(
        config((["Linear"], INT4), ignore=["re:.*"]), dense_model(None),
        everywhere("nothing-packed", "refused"), "config.json", "remove quantization_config",
    ),
    "experts per channel of a width without a kernel": Bad(
        config((["Linear"], CHANNEL), ignore=["lm_head", ROUTERS]),
        moe_model(CHANNEL, CHANNEL, inner=96),
        everywhere("experts-channel", "refused", SERVERS),
        "model.layers.0.mlp.experts", "repeat the scales to group 32",
    ),
}  # fmt: skip

GOOD = {
    "one class-name group": (config((["Linear"], INT4)), dense_model(), 1),
    "one class-name group of experts": (
        config((["Linear"], INT4), ignore=["lm_head", ROUTERS]), moe_model(), 1,
    ),
    "int8 per channel": (config((["Linear"], Scheme(8, None))), dense_model(Scheme(8, None)), 1),
    "tensor parallelism that fits": (config((["Linear"], INT4)), dense_model(), 4),
    "layers that differ": (
        config(([r"re:.*layers\.1\.self_attn\.(q|k|v|qkv)_proj$"], GROUP64),
               ([r"re:.*s\.(0|2)\.self_attn\.(q|k|v|qkv)_proj$", r"re:.*o_proj$", MLPS], INT4)),
        [replace(x, scheme=GROUP64) if ".1.self_attn" in x.name and "o_proj" not in x.name else x
         for x in dense_model()], 2,
    ),
    "experts of their own scheme": (
        config(([EXPERTS], INT8), ([ATTENTION], GROUP64), ignore=["lm_head", ROUTERS]),
        moe_model(GROUP64, INT8), 1,
    ),
    "whole names": (
        config(([x.name for x in dense_model() if x.scheme], INT4)), dense_model(), 1,
    ),
    "an untied quantized head that is named": (
        config((["Linear", "re:.*lm_head$"], INT4), ignore=[]),
        [*dense_model()[:-1], replace(HEAD, scheme=INT4)], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_failure_is_found_with_its_remedy(name: str) -> None:
    bad = BAD[name]
    for engine in ALL:
        found = find_problems(bad.config, bad.layers, engine, tp=bad.tp, ep=bad.ep)
        serious = [f for f in found if f.effect != "slow"]
        if engine not in bad.found:
            assert not serious, f"{engine} would load it"
            continue
        rule, effect = bad.found[engine]
        hits = [f for f in serious if f.rule == rule and bad.layer in f.layers]
        assert len(hits) == 1, serious
        assert hits[0].effect == effect, hits
        assert hits[0].engine == engine
        assert bad.remedy in hits[0].remedy, hits


@pytest.mark.parametrize("name", BAD)
def test_the_order_of_layers_says_nothing(name: str) -> None:
    bad = BAD[name]
    for engine in ALL:
        one, other = (
            find_problems(bad.config, layers, engine, tp=bad.tp, ep=bad.ep)
            for layers in (bad.layers, bad.layers[::-1])
        )
        assert {(f.rule, f.effect) for f in one} == {(f.rule, f.effect) for f in other}


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("name", GOOD)
def test_good_checkpoints_raise_no_alarm(name: str, engine: str) -> None:
    content, layers, tp = GOOD[name]
    found = find_problems(content, layers, engine, tp=tp)
    assert [f for f in found if f.effect != "slow"] == []


@pytest.mark.parametrize(("model_type", "rules"), [("llama", {"no-target"}), ("qwen3_moe", set())])
def test_sglang_knows_parts_only_where_a_class_names_them(model_type: str, rules: set[str]) -> None:
    content, layers, _ = GOOD["whole names"]
    found = find_problems(with_top_level(content, model_type=model_type), layers, "sglang")
    assert {f.rule for f in found} == rules
    names = {last(name) for finding in found for name in finding.layers}
    assert names == ({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} if rules else set())


def test_shapes_that_are_filled_up_are_slow_and_load() -> None:
    layers = [replace(x, k=544) if x.name.endswith("q_proj") else x for x in dense_model(CHANNEL)]
    (found,) = find_problems(config((["Linear"], CHANNEL)), layers, "vllm")
    assert (found.rule, found.effect) == ("tile", "slow")
    assert [name.split(".")[2] for name in found.layers] == ["0", "1", "2"]


@pytest.mark.parametrize(("tp", "splits"), [(16, True), (24, False)])
def test_rows_of_a_head_are_filled_up_before_they_are_split(tp: int, splits: bool) -> None:
    content, layers, _ = GOOD["an untied quantized head that is named"]
    found = find_problems(content, layers, "vllm", tp=tp)  # 1000 rows are 1024
    refused = [f for f in found if f.rule == "tp-splits-n" and "lm_head" in f.layers]
    assert (refused == []) == splits


@pytest.mark.parametrize(
    "name",
    [
        "fused shards of different group sizes",
        "a tied quantized head",
        "a fused layer whose first part has another target",
    ],
)
def test_files_give_the_same_findings(name: str, tmp_path: Path) -> None:
    bad = BAD[name]
    directory = write(tmp_path, bad.config, bad.layers)
    for engine in ALL:
        content = with_top_level(bad.config, model_type="llama")
        expected = find_problems(content, bad.layers, engine)
        found = fqcompile.check(directory, engine)
        kinds = [{(f.rule, f.effect, frozenset(f.layers)) for f in fs} for fs in (expected, found)]
        assert kinds[0] == kinds[1]


def test_unknown_engines_and_degrees_are_refused(tmp_path: Path) -> None:
    write(tmp_path, config((["Linear"], INT4)), dense_model())
    with pytest.raises(OptionError, match="engine is 'tgi'; allowed: vllm, sglang, transformers"):
        fqcompile.check(tmp_path, "tgi")
    with pytest.raises(OptionError, match="tp is 0; allowed: an int >= 1"):
        fqcompile.check(tmp_path, tp=0)


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"architectures": ["LlamaForCausalLM"]}, dense_model(None))
    with pytest.raises(CheckpointError, match="has no quantization_config"):
        fqcompile.check(tmp_path)


def on_cpu(layers: list[Layer], **how: Any) -> dict[str, tuple[str, frozenset[str]]]:
    """What vLLM on a CPU would not load, by rule."""
    scheme = next(layer.scheme for layer in layers if layer.scheme)
    content = config((["Linear"], scheme), ignore=["lm_head", ROUTERS])
    found = find_problems(content, layers, "vllm", device="cpu", **how)
    assert not [f for f in found if f.effect == "slow"], "kernels of GPUs are none of its"
    return {f.rule: (f.effect, frozenset(f.layers)) for f in found}


def test_what_vllm_runs_on_a_cpu() -> None:
    """4 bits in any even groups; N and K of what it fuses in multiples of 32."""
    assert on_cpu(dense_model()) == {}
    assert on_cpu(dense_model(Scheme(4, None))) == {}
    assert on_cpu(dense_model(ASYMMETRIC)) == {}
    assert on_cpu([replace(x, k=544) for x in dense_model(Scheme(4, 34))]) == {}
    narrow = [
        replace(x, n=48) if x.name.endswith(("q_proj", "k_proj")) else x for x in dense_model()
    ]
    assert on_cpu(narrow) == {}  # 48 + 48 + 512
    names = frozenset(x.name for x in dense_model(INT8) if x.scheme)
    assert on_cpu(dense_model(INT8)) == {"cpu-bits": ("refused", names)}
    found = on_cpu([replace(x, n=520) if x.name.endswith("o_proj") else x for x in dense_model()])
    ((effect, layers),) = (found[rule] for rule in found)
    assert found.keys() == {"cpu-shape"} and effect == "refused"
    assert all(name.endswith("o_proj") for name in layers) and len(layers) == 3
    content, layers, _ = GOOD["an untied quantized head that is named"]
    assert find_problems(content, layers, "vllm", device="cpu") == []  # 1000 rows are held as 1024
    odd = [replace(x, k=495) for x in dense_model(Scheme(4, 33))]
    assert "cpu-group-size" in on_cpu(odd)


@pytest.mark.parametrize(
    ("experts", "problem"),
    [
        (INT4, "x86 CPUs with AMX"),
        (INT8, "int8 group 128 have no kernel"),
        (CHANNEL, "int4 channel have no kernel"),
        (ASYMMETRIC, "int4 group 128 asymmetric have no kernel"),
    ],
)
def test_experts_on_a_cpu(experts: Scheme, problem: str) -> None:
    content = config(([EXPERTS], experts), ([ATTENTION], INT4), ignore=["lm_head", ROUTERS])
    layers = moe_model(INT4, experts)
    assert not [f for f in find_problems(content, layers, "vllm") if not f.loads]
    (found,) = find_problems(content, layers, "vllm", device="cpu")
    assert (found.rule, found.effect, len(found.layers)) == ("cpu-experts", "refused", 3)
    assert problem in found.problem
    assert "--exclude experts" in found.remedy
    if experts.symmetric:
        assert find_problems(content, layers, "transformers", device="cpu") == []


def test_devices_that_have_no_rules(tmp_path: Path) -> None:
    write(tmp_path, config((["Linear"], INT8)), dense_model(INT8))
    with pytest.raises(OptionError, match="device is 'tpu'; allowed for vllm: cuda, cpu"):
        fqcompile.check(tmp_path, device="tpu")
    with pytest.raises(OptionError, match="device is 'cpu'; allowed for sglang: cuda"):
        fqcompile.check(tmp_path, "sglang", device="cpu")
    assert main(["check", str(tmp_path), "--engine", "vllm"]) == 0
    assert main(["check", str(tmp_path), "--engine", "vllm", "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("installed", "said"), [("0.17.0", True), (None, True), ("0.20.0", False), ("1.2", False)]
)
def test_experts_need_a_newer_library(
    installed: str | None, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In transformers; and as it may be installed elsewhere, nothing is refused for that."""

    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(expert_rules, "version", version)
    content = config((["Linear"], INT4), ignore=["lm_head", ROUTERS])
    found = find_problems(content, moe_model(), "transformers")
    assert [(f.rule, f.effect) for f in found] == [("experts-version", "needs")] * said
    assert all("compressed-tensors 0.20" in f.problem and f.loads for f in found)
    assert all(f"{installed or 'none'}"[:4] in f.problem for f in found)
    assert find_problems(content, moe_model(), "vllm") == []
    assert find_problems(config((["Linear"], INT4)), dense_model(), "transformers") == []


@pytest.mark.parametrize(
    ("family", "child"), [("t5", "q"), ("umt5", "wo"), ("mamba2", "out_proj"), ("llama", "q")]
)
def test_families_whose_initialization_reads_packed_weights(family: str, child: str) -> None:
    """transformers 5.23: 'Linear' object has no attribute 'weight' in from_pretrained."""
    layers = [Layer(f"encoder.block.0.{child}", HIDDEN, HIDDEN, INT4), HEAD]
    content = {**config(([rf"re:.*\.{child}$"], INT4)), "model_type": family}
    found = find_problems(content, layers, "transformers")
    if family == "llama":
        assert found == []
        return
    (finding,) = found
    assert (finding.rule, finding.effect) == ("initialized-by-name", "refused")
    assert finding.layers == (layers[0].name,) and not finding.loads
    assert f"{child}.weight" in finding.problem and "exclude" in finding.remedy
    assert not any(f.rule == finding.rule for f in find_problems(content, layers, "vllm"))
