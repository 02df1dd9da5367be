"""vLLM for CPUs itself: it loads and generates from exports, and does what `check` says it would.

`make test-engines` installs it in .venv-engines; where that is not, these tests are skipped.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

import fqcompile
from tests.dense_models import COMMON
from tests.helpers import tolerance
from tests.interop.models import library_dense, tensors_of
from tests.moe_models import build as build_moe

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("FQTEST_ENGINES", ROOT / ".venv-engines")) / "bin" / "python"
needs_vllm = pytest.mark.skipif(
    not PYTHON.exists(), reason="`make test-engines` installs vLLM for CPUs"
)
pytestmark = [pytest.mark.slow, needs_vllm]

PROMPTS = [[5, 17, 200, 3], [9, 8, 7, 6, 5, 4, 3, 2], [511]]
DECODER = {"num_key_value_heads": 2, "tie_word_embeddings": False}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, **DECODER)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**COMMON, **DECODER)),
    "mixtral": lambda: build_moe("mixtral", torch.bfloat16, "grouped_mm"),
}
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, adaptive": ("llama", {}),
    "llama, per channel, to serve": ("llama", {"granularity": "column", "profile": "serve"}),
    "qwen2, groups of 32": ("qwen2", {"granularity": 32}),
    "qwen2, layers that differ": (
        "qwen2",
        {"profile": "serve", "overrides": {r"layers\.0\.": {"granularity": 64}}},
    ),
    "llama, int8": ("llama", {"bits": 8}),
    "mixtral": ("mixtral", {}),
}
ON_CPU = ["llama, adaptive", "llama, per channel, to serve", "qwen2, groups of 32",
          "qwen2, layers that differ"]  # fmt: skip
REFUSED = {"llama, int8": "Quant type", "mixtral": "No WNA16 MoE backend"}


@dataclass(frozen=True)
class Outcome:
    """What an engine made of a checkpoint: an error, or its parameters and what it generated."""

    error: str
    parameters: Mapping[str, Tensor]
    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]


VLLM = ROOT / "tests" / "interop" / "vllm_cpu.py"


def ask(
    folder: Path, tasks: Mapping[Any, Mapping[str, Any]], script: Path = VLLM
) -> dict[Any, Outcome]:
    """Each task done by the engine that the script runs, in one process and its children."""
    outs = {name: folder / f"task{i}" for i, name in enumerate(tasks)}
    full = [{**task, "out": str(outs[name])} for name, task in tasks.items()]
    (folder / "tasks.json").write_text(json.dumps(full), encoding="utf-8")
    done = subprocess.run(
        [PYTHON, "-W", "ignore", script, folder / "tasks.json"],
        cwd=folder, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name, out in outs.items():
        said = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        tensors = out.with_suffix(".safetensors")
        loaded = load_file(tensors) if tensors.exists() else {}
        rest = (said.get("tokens", []), said.get("logprobs", []))
        found[name] = Outcome(said.get("error", ""), loaded, *rest)
    return found


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
STACKED = {"w13": (("gate_proj", "up_proj"), ("w1", "w3")), "w2": (("down_proj",), ("w2",))}


def stored(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What a checkpoint has for a parameter of vLLM's; None: it does not have all of that."""
    stack, _, own = name.partition(".routed_experts.")
    if own:
        kind, _, part = own.partition("_")
        count = len({n.removeprefix(stack).split(".")[1] for n in tensors if n.startswith(stack)})
        parts = next((p for p in STACKED[kind] if f"{stack}.0.{p[0]}.{part}" in tensors), None)
        if parts is None:
            return None
        of = [[tensors[f"{stack}.{e}.{p}.{part}"] for p in parts] for e in range(count)]
        return torch.stack([torch.cat(tensors) for tensors in of])
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            names = [name.replace(fused, part) for part in parts]
            return torch.cat([tensors[n] for n in names]) if tensors.keys() >= set(names) else None
    tied = name == "lm_head.weight" and name not in tensors
    return tensors.get("model.embed_tokens.weight" if tied else name)


def unlike(loaded: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """The parameters whose bits are not the checkpoint's; rows that fill up a vocabulary go."""
    found = []
    for name, actual in loaded.items():
        # Scales of its cache, and the router, which it has twice.
        if name.endswith("weight_shape") or ".attn." in name or ".experts.gate." in name:
            continue
        expected = stored(name, tensors)
        if expected is None or not torch.equal(actual[: len(expected)], expected):
            found.append(name)
    return found


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for i, (name, (model, options)) in enumerate(EXPORTS.items()):
        torch.manual_seed(0)
        MODELS[model]().to(torch.bfloat16).save_pretrained(folder / f"{i}-dense")
        found[name] = folder / str(i)
        fqcompile.export(folder / f"{i}-dense", found[name], min_elements=1024, **options)
    return found


@pytest.fixture(scope="module")
def served(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    tasks = {name: {"directory": str(at), "prompts": PROMPTS} for name, at in exports.items()}
    return ask(tmp_path_factory.mktemp("served"), tasks)


@pytest.mark.parametrize("name", ON_CPU)
def test_packed_tensors_are_loaded_bit_for_bit(
    name: str, exports: dict[str, Path], served: dict[str, Outcome]
) -> None:
    assert not served[name].error
    loaded = served[name].parameters
    assert sum(n.endswith("weight_packed") for n in loaded) >= 4 * COMMON["num_hidden_layers"]
    assert unlike(loaded, tensors_of(exports[name])) == []


@pytest.mark.parametrize("name", ON_CPU)
def test_tokens_are_those_of_the_dequantized_model(
    name: str, exports: dict[str, Path], served: dict[str, Outcome]
) -> None:
    """Each token is the likeliest of fp32 logits, or within bf16's rounding of the likeliest."""
    config = hf.AutoConfig.from_pretrained(exports[name])
    del config.quantization_config
    oracle = hf.AutoModelForCausalLM.from_config(config).float().eval()
    oracle.load_state_dict(library_dense(exports[name]))
    told_apart = 0
    for prompt, tokens, logprobs in zip(
        PROMPTS, served[name].tokens, served[name].logprobs, strict=True
    ):
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + list(tokens)])).logits[0, len(prompt) - 1 : -1]
        # Two layers of two blocks, the norm and the head: five bf16 results after each other.
        bound = tolerance(torch.bfloat16, depth=5) * logits.abs().amax().item()
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (logits.amax(1) - chosen <= 2 * bound).all()
        top = logits.topk(2).values
        told_apart += int((top[:, 0] - top[:, 1] > 2 * bound).sum())
        said = torch.tensor(logprobs)
        expected = logits.log_softmax(1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (said - expected).abs().max() <= 2 * bound
    assert told_apart >= 5, "too few of 36 tokens are told apart"


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_check_says(
    name: str, exports: dict[str, Path], served: dict[str, Outcome]
) -> None:
    assert REFUSED[name] in served[name].error
    assert any(not f.loads for f in fqcompile.check(exports[name], "vllm", device="cpu"))
    assert all(f.loads for f in fqcompile.check(exports[name], "vllm"))
