"""SGLang's own loader, on a CPU: it fills packed parameters with the bits of exports.

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
from tests.interop.test_check import BAD, GOOD
from tests.interop.test_engines import EXPORTS, MODELS, PYTHON, ask, unlike

SCRIPT = Path(__file__).parent / "sglang_cpu.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not list(PYTHON.parents[1].glob("lib/python*/site-packages/sglang")),
        reason="`make test-engines` installs SGLang",
    ),
]

DENSE_QKV = {"exclude": [r"layers\.1\.self_attn\.(q|k|v)_proj"]}
LOADED = EXPORTS | {"llama, one layer's q/k/v dense": ("llama", DENSE_QKV)}
# What it refuses, and what it loads with other bits without a word.
REFUSED = {
    "whole names": "Unable to find matching target",
    "fused shards of different group sizes": "param_data.shape=torch.Size([512, 4])",
    "a class name as target beside others": "param_data.shape=torch.Size([512, 4])",
    "experts by names that SGLang does not look up": "Unable to find matching target",
    "projections of an MoE layer with different groups": "All MoE projections need to have same",
    "asymmetric experts": "must match the size of tensor b (8)",
    "dense and in no list": "Unable to find matching target",
    "a quantized router": "",
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
    for name in REFUSED:
        content, layers, *_ = GOOD[name] if name in GOOD else (BAD[name].config, BAD[name].layers)
        written[name] = write(folder / name, content, layers)
    tasks = {name: {"directory": str(at)} for name, at in written.items()}
    return written, ask(folder, tasks, SCRIPT)


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


@pytest.mark.parametrize("name", REFUSED)
def test_it_does_not_load_what_check_refuses(name: str, asked: tuple[dict, dict]) -> None:
    directory, outcome = asked[0][name], asked[1][name]
    assert any(not finding.loads for finding in fqcompile.check(directory, "sglang"))
    assert REFUSED[name] in outcome.error
    if not REFUSED[name]:
        assert unlike(by_vllm_names(outcome.parameters), tensors_of(directory))
