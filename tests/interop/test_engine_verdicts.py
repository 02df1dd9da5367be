"""What `check` says of each checkpoint of test_check, and what vLLM for CPUs makes of it.

Each is written as a model with random codes, on which vLLM's own loader runs. vLLM has loaded it
correctly where every parameter has the checkpoint's bits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

import fqcompile
from fqcompile.interop.check import find_problems
from fqcompile.interop.findings import Finding
from fqcompile.interop.layers import Layer, Scheme, stack_of
from tests.interop.checkpoints import (
    HIDDEN,
    INT4,
    VOCAB,
    changed,
    config,
    dense_model,
    moe_model,
    whole_config,
    write,
)
from tests.interop.models import tensors_of
from tests.interop.test_check import (
    ATTENTION,
    BAD,
    CHANNEL,
    GOOD,
    ROUTERS,
    with_top_level,
)
from tests.interop.test_engines import ROOT, Outcome, ask, needs_vllm, unlike

GUIDE = ROOT / "docs" / "design" / "engine-verdicts.md"


@dataclass(frozen=True)
class Checkpoint:
    """`amx`: whether vLLM shall take the processor to have it, as packed experts need."""

    config: Any
    layers: list[Layer]
    amx: bool


def _checkpoint(content: Any, layers: list[Layer]) -> Checkpoint:
    return Checkpoint(content, layers, any(x.scheme and stack_of(x.name) for x in layers))


UP, DOWN = r"re:.*mlp\.(gate|up|gate_up)_proj$", r"re:.*mlp\.down_proj$"
HEADS = ["Linear", "re:.*lm_head$"], INT4
PACKED_HEAD = [*dense_model()[:-1], Layer("lm_head", VOCAB, HIDDEN, INT4)]
EMBEDDING = Layer("model.embed_tokens", VOCAB, HIDDEN, INT4)
QWEN3 = config((["Linear", "re:.*embed_tokens$"], INT4))
# What test_check has no checkpoint for, as it depends on vLLM, a model's class, or a processor.
OTHERS = {
    "a tied quantized head that is named": _checkpoint(
        with_top_level(config(HEADS, ignore=[]), tie_word_embeddings=True), PACKED_HEAD
    ),
    "a quantized embedding of Qwen3": _checkpoint(
        with_top_level(QWEN3, model_type="qwen3"), [*dense_model(), EMBEDDING]
    ),
    "an even group size": _checkpoint(
        config(([ATTENTION, UP], INT4), ([DOWN], Scheme(4, 34))),
        changed(dense_model(inner=544), "down_proj", Scheme(4, 34)),
    ),
    "an odd group size": _checkpoint(
        config(([ATTENTION, UP], INT4), ([DOWN], Scheme(4, 33))),
        changed(dense_model(inner=1056), "down_proj", Scheme(4, 33)),
    ),
    "widths that are no multiples of 32": _checkpoint(
        config((["Linear"], CHANNEL)), dense_model(CHANNEL, inner=1000)
    ),
    "experts without AMX": Checkpoint(
        config((["Linear"], INT4), ignore=["lm_head", ROUTERS]), moe_model(), amx=False
    ),
}
CHECKPOINTS = {
    # On one device; and the config of a language model in another has nothing around it here.
    **{
        name: _checkpoint(bad.config, bad.layers)
        for name, bad in BAD.items()
        if bad.tp == bad.ep == 1 and "text_config" not in bad.config
    },
    **{
        name: _checkpoint(content, layers)
        for name, (content, layers, _) in GOOD.items()
        if name != "tensor parallelism that fits"
    },
    **OTHERS,
}

LOADS, WRONG = "loads", "loads with other bits"
NO_KERNEL = "Failed to find a kernel that can implement the WNA16 linear layer"
UNKNOWN = "There is no module or parameter named"
UNLIKE = "Found different quantization schemes for the shards of"
NO_EXPERTS = "No WNA16 MoE backend supports the deployment configuration"
# What vLLM 0.32 did, or a part of its message.
SAID = {
    "fused shards of different group sizes": "AssertionError",
    "fused shards of different bits": NO_KERNEL,
    "fused shards with and without zero points": WRONG,
    "a fused shard left dense": UNLIKE,
    "a fused shard ignored though packed": UNLIKE,
    "a class name as target beside others": LOADS,
    "a regular expression without an end": "start (0) + length (8) exceeds dimension size (4)",
    "a fused layer whose first part has another target": "AssertionError",
    "packed and no target": UNKNOWN,
    "dense and not ignored": UNKNOWN,
    "dense and in no list": LOADS,
    "attention-only quantization of an MoE": LOADS,
    "mixed bits among the experts of a layer": "must match the size of tensor b (256)",
    "projections of an MoE layer with different groups": "All MoE projections need to have same",
    "mixed bits among the experts of different layers": NO_EXPERTS,
    "mixed groups among the experts of different layers": LOADS,
    "experts whose group is not found by its targets": NO_KERNEL,
    "experts of which no projection matches": "has no parameter 'w2_weight_packed'",
    "experts by names that SGLang does not look up": LOADS,
    "experts by names that vLLM does not look up": "has no parameter 'w13_weight_packed'",
    "experts of Mixtral by the names of others": "has no parameter 'w2_weight_packed'",
    "class names in ignore": LOADS,
    "a packed layer that ignore names": UNKNOWN,
    "packed experts that ignore names": "has no parameter 'w2_weight_packed'",
    "a fused layer ignored by its own name alone": LOADS,
    "a fused layer of which one part matches a target": "object has no attribute 'data'",
    "experts under a target of linears": NO_KERNEL,
    "asymmetric experts": NO_EXPERTS,
    "asymmetric int8": NO_KERNEL,
    "a tied quantized head": UNKNOWN,
    "an untied quantized head that only a class names": UNKNOWN,
    "a quantized embedding": UNKNOWN,
    "a quantized router": NO_KERNEL,
    "a group size without a kernel": LOADS,
    "K that is not a multiple of the group": NO_KERNEL,
    "K that fills no words": NO_KERNEL,
    "bits without a kernel": NO_KERNEL,
    "another format": "1 validation error for VllmConfig",
    "mixed formats": "No compressed-tensors compatible scheme was found",
    "nothing packed": LOADS,
    "experts per channel of a width without a kernel": "AssertionError",
    "one class-name group": LOADS,
    "one class-name group of experts": LOADS,
    "int8 per channel": NO_KERNEL,
    "layers that differ": LOADS,
    "experts of their own scheme": NO_EXPERTS,
    "whole names": LOADS,
    "an untied quantized head that is named": LOADS,
    "asymmetric int4 without experts": LOADS,
    "a tied quantized head that is named": LOADS,
    "a quantized embedding of Qwen3": LOADS,
    "an even group size": LOADS,
    "an odd group size": NO_KERNEL,
    "widths that are no multiples of 32": NO_KERNEL,
    "experts without AMX": NO_EXPERTS,
}
# What vLLM loads as stored, and why `check` is against it all the same.
STRICTER = {
    "nothing packed": "who quantized a model did not want it served dense",
    "a tied quantized head that is named": "others take the dense embedding instead",
    "a quantized embedding of Qwen3": "most classes refuse it, and a CPU cannot run its kernel",
}


def against(name: str, findings: list[Finding]) -> list[Finding]:
    """What is against loading it; where AMX is assumed, not that it is missing."""
    serious = [finding for finding in findings if not finding.loads]
    return [f for f in serious if not (CHECKPOINTS[name].amx and "AMX" in f.problem)]


def rows(engine: str, said: dict[str, str], otherwise: dict[str, str]) -> str:
    """The guide's table for an engine; `otherwise`: why it does not do as `check` says."""
    found = []
    for name, text in said.items():
        layers = CHECKPOINTS[name].layers
        problems = find_problems(whole_config(CHECKPOINTS[name].config, layers), layers, engine)
        kinds = dict.fromkeys(f"{f.effect} ({f.rule})" for f in problems if not f.loads)
        mark = f"; {otherwise[name]}" if name in otherwise else ""
        found.append(f"| {name} | {', '.join(kinds) or LOADS} | {text}{mark} |")
    return "\n".join(found)


def test_each_checkpoint_is_in_the_table() -> None:
    assert SAID.keys() == CHECKPOINTS.keys()


def test_the_guide_has_the_table() -> None:
    rows = []
    for name, said in SAID.items():
        found = find_problems(
            CHECKPOINTS[name].config, CHECKPOINTS[name].layers, "vllm", device="cpu"
        )
        kinds = dict.fromkeys(f"{f.effect} ({f.rule})" for f in against(name, found))
        mark = "*" if name in STRICTER else ""
        rows.append(f"| {name} | {', '.join(kinds) or LOADS}{mark} | {said} |")
    assert "\n".join(rows) in GUIDE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("verdicts")
    written = {
        name: write(folder / str(i), CHECKPOINTS[name].config, CHECKPOINTS[name].layers)
        for i, name in enumerate(SAID)
    }
    tasks = {
        name: {"directory": str(at), "amx": CHECKPOINTS[name].amx} for name, at in written.items()
    }
    return written, ask(folder, tasks)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_vllm_does_what_check_says(
    name: str, loaded: tuple[dict[str, Path], dict[str, Outcome]]
) -> None:
    directory, outcome = loaded[0][name], loaded[1][name]
    said, expected = outcome.error, {"refused"}
    if not said:
        other = unlike(outcome.parameters, tensors_of(directory))
        said, expected = (WRONG, {"wrong"}) if other else (LOADS, set())
    assert SAID[name] in said
    findings = fqcompile.check(directory, "vllm", device="cpu")
    effects = {finding.effect for finding in against(name, findings)}
    if name in STRICTER:
        assert said == LOADS and effects
    else:
        # What an engine refuses may have been wrong besides.
        assert effects & expected if expected else not effects, effects
