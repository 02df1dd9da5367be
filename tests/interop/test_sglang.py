"""SGLang's own loader, on a CPU: it fills packed parameters with the bits of exports, and does with
each checkpoint of test_check what `check` says.

`make test-engines` installs it beside vLLM; where it is not, these tests are skipped.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

import fqcompile
from tests.dense_models import COMMON
from tests.interop.checkpoints import write
from tests.interop.models import tensors_of
from tests.interop.test_engine_verdicts import CHECKPOINTS, GUIDE, LOADS, WRONG, rows
from tests.interop.test_engines import EXPORTS, MODELS, PYTHON, ask, unlike

SCRIPT = Path(__file__).parent / "sglang_cpu.py"
needs_sglang = pytest.mark.skipif(
    not list(PYTHON.parents[1].glob("lib/python*/site-packages/sglang")),
    reason="`make test-engines` installs SGLang",
)

DENSE_QKV = {"exclude": [r"layers\.1\.self_attn\.(q|k|v)_proj"]}
LOADED = EXPORTS | {"llama, one layer's q/k/v dense": ("llama", DENSE_QKV)}
NO_TARGET = "Unable to find matching target"
OTHER_METHOD = "Other method (CompressedTensorsW4A16Sparse24) is not supported now"
# What SGLang 0.5.23's loader did, or a part of its message.
SAID = {
    "fused shards of different group sizes": "param_data.shape=torch.Size([512, 4])",
    "fused shards of different bits": "AssertionError",
    "fused shards with and without zero points": NO_TARGET,
    "a fused shard left dense": WRONG,
    "a fused shard ignored though packed": LOADS,
    "a class name as target beside others": "param_data.shape=torch.Size([512, 4])",
    "a regular expression without an end": WRONG,
    "a fused layer whose first part has another target": NO_TARGET,
    "packed and no target": NO_TARGET,
    "dense and not ignored": WRONG,
    "dense and in no list": NO_TARGET,
    "attention-only quantization of an MoE": LOADS,
    "mixed bits among the experts of a layer": "must match the size of tensor b (256)",
    "projections of an MoE layer with different groups": "All MoE projections need to have same",
    "mixed bits among the experts of different layers": LOADS,
    "mixed groups among the experts of different layers": LOADS,
    "experts whose group is not found by its targets": LOADS,
    "experts of which no projection matches": NO_TARGET,
    "experts by names that SGLang does not look up": NO_TARGET,
    "experts by names that vLLM does not look up": LOADS,
    "experts of Mixtral by the names of others": WRONG,
    "class names in ignore": LOADS,
    "a packed layer that ignore names": WRONG,
    "packed experts that ignore names": WRONG,
    "a fused layer ignored by its own name alone": LOADS,
    "a fused layer of which one part matches a target": NO_TARGET,
    "experts under a target of linears": "must match the size of tensor b (64)",
    "asymmetric experts": "must match the size of tensor b (8)",
    "asymmetric int8": LOADS,
    "a tied quantized head": LOADS,
    "an untied quantized head that only a class names": WRONG,
    "a quantized embedding": WRONG,
    "a quantized router": WRONG,
    "a group size without a kernel": LOADS,
    "K that is not a multiple of the group": "AssertionError",
    "K that fills no words": WRONG,
    "bits without a kernel": OTHER_METHOD,
    "another format": OTHER_METHOD,
    "mixed formats": OTHER_METHOD,
    "nothing packed": LOADS,
    "experts per channel of a width without a kernel": LOADS,
    "one class-name group": LOADS,
    "one class-name group of experts": LOADS,
    "int8 per channel": LOADS,
    "layers that differ": LOADS,
    "experts of their own scheme": LOADS,
    "whole names": NO_TARGET,
    "an untied quantized head that is named": LOADS,
    "asymmetric int4 without experts": LOADS,
    "a tied quantized head that is named": LOADS,
    "a quantized embedding of Qwen3": WRONG,
    "an even group size": LOADS,
    "an odd group size": LOADS,
    "widths that are no multiples of 32": LOADS,
    "experts without AMX": LOADS,
}
_KERNELS = "GPU kernels refuse it, which the loader does not ask"
_TIED = "the head takes the dense embedding, and its own tensors are skipped"
# What the loader does not do as `check` says, and why.
OTHERWISE = {
    "fused shards with and without zero points": "its target is not found, before values are wrong",
    "a tied quantized head": _TIED,
    "a tied quantized head that is named": _TIED,
    "nothing packed": "who quantized a model did not want it served dense",
    "asymmetric int8": _KERNELS,
    "a group size without a kernel": _KERNELS,
    "an even group size": _KERNELS,
    "an odd group size": _KERNELS,
    "K that fills no words": _KERNELS,
    "experts per channel of a width without a kernel": _KERNELS,
}


def by_vllm_names(loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by vLLM's names; packed experts are stored transposed."""
    found = {}
    for name, tensor in loaded.items():
        if "g_idx" not in name:
            packed = name.endswith(("_weight_packed", "_weight_scale"))
            name = name.replace(".experts.w", ".experts.routed_experts.w")
            found[name] = tensor.transpose(1, 2) if packed else tensor
    return found


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("sglang")
    written = {}
    for i, (name, (model, options)) in enumerate(LOADED.items()):
        torch.manual_seed(0)
        MODELS[model]().to(torch.bfloat16).save_pretrained(folder / f"{i}-dense")
        written[name] = folder / str(i)
        fqcompile.export(folder / f"{i}-dense", written[name], min_elements=1024, **options)
    for name, checkpoint in CHECKPOINTS.items():
        written[name] = write(folder / name, checkpoint.config, checkpoint.layers)
    tasks = {name: {"directory": str(at)} for name, at in written.items()}
    return written, ask(folder, tasks, SCRIPT)


@needs_sglang
@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_packed_tensors_are_loaded_bit_for_bit(name: str, asked: tuple[dict, dict]) -> None:
    directory, outcome = asked[0][name], asked[1][name]
    assert not outcome.error
    assert all(finding.loads for finding in fqcompile.check(directory, "sglang"))
    loaded = by_vllm_names(outcome.parameters)
    dense = 1 if "dense" in name else 0
    packed = sum(n.endswith("weight_packed") for n in loaded)
    assert packed >= 4 * COMMON["num_hidden_layers"] - dense
    assert unlike(loaded, tensors_of(directory)) == []


def test_each_checkpoint_is_in_the_table() -> None:
    assert SAID.keys() == CHECKPOINTS.keys() > OTHERWISE.keys()


def test_the_guide_has_the_table() -> None:
    assert rows("sglang", SAID, OTHERWISE) in GUIDE.read_text(encoding="utf-8")


@needs_sglang
@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_it_does_what_check_says(name: str, asked: tuple[dict, dict]) -> None:
    directory, outcome = asked[0][name], asked[1][name]
    said, expected = outcome.error, {"refused"}
    if not said:
        other = unlike(by_vllm_names(outcome.parameters), tensors_of(directory))
        said, expected = (WRONG, {"wrong"}) if other else (LOADS, set())
    assert SAID[name] in said
    effects = {f.effect for f in fqcompile.check(directory, "sglang") if not f.loads}
    if name in OTHERWISE:
        assert effects and effects != expected
    else:
        assert effects == expected
