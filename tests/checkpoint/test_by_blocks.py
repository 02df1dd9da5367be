"""Checkpoints quantized by data, block by block: as `quantize_` makes them, in little memory."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf

import fqcompile
from fqcompile.checkpoint import data, shards
from fqcompile.errors import CheckpointError
from fqcompile.modules import gptq
from fqcompile.weights.parameter import PackedWeight
from tests.checkpoint.crashes import count_operations, crash
from tests.checkpoint.test_quantize_checkpoint import state_of
from tests.children import FORK
from tests.helpers import frozen

VOCAB = 128
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB,
}  # fmt: skip
WIDE: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 96}
MODELS: dict[str, Any] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)),
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**WIDE, num_local_experts=4)),
    "Gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **WIDE, head_dim=16, sliding_window=24, pad_token_id=0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "OPT": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=128)
    ),
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "Albert": lambda: hf.AlbertForMaskedLM(
        hf.AlbertConfig(**SIZES, embedding_size=64, intermediate_size=96, num_hidden_groups=1)
    ),
}  # fmt: skip
OPTIONS: dict[str, Any] = {"min_elements": 2048, "granularity": 32}


def checkpoint(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    model = frozen(MODELS[name]())
    with torch.no_grad():  # with inputs that have something in common
        model.get_input_embeddings().weight.mul_(3).add_(torch.randn(64))
    model.save_pretrained(directory)
    return directory


def batches(name: str) -> list[Any]:
    ids = torch.randint(1, VOCAB, (10, 7, 30), generator=torch.Generator().manual_seed(1))
    if name == "T5":
        return [{"input_ids": one, "decoder_input_ids": one.flip(1)} for one in ids]
    return [*ids[:6], *({"input_ids": one, "attention_mask": one % 9 > 0} for one in ids[6:])]


def values_of(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, PackedWeight):
            own = parameter.quantized()
            found |= {f"{name} codes": own.qweight, f"{name} scale": own.scale}
        else:
            found[name] = parameter.detach()
    return found


@pytest.mark.few(7)
@pytest.mark.parametrize("method", ["scale", "synthetic", "gptq"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_what_the_whole_model_gives(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(name, tmp_path / "source")
    given: dict[str, Any] = {"calibration": batches(name), "method": method}
    if method == "synthetic":
        given = {"calibration": "synthetic"}
    model = type(MODELS[name]()).from_pretrained(source)
    expected = fqcompile.quantize_(model, **given, **OPTIONS)
    monkeypatch.setattr(data, "quantize_", None)  # is not called
    plan = fqcompile.quantize_checkpoint(source, tmp_path / "out", **given, **OPTIONS)
    loaded, own = values_of(fqcompile.load(None, tmp_path / "out")), values_of(model)
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[key], own[key]) for key in own)
    facts = [[(site.name, site.calibration, site.bits, site.reason) for site in p.sites]
             for p in (plan, expected)]  # fmt: skip
    assert facts[0] == facts[1] and plan.options == expected.options
    done = [str(site.calibration) for site in plan.quantized]
    assert sum("batches; gptq" in one or method in one or one == "batches" for one in done) > 5


def gptq_run(source: Path, out: Path, **how: Any) -> None:
    given = {"calibration": batches("Llama"), "method": "gptq"}
    fqcompile.quantize_checkpoint(source, out, **given, **how, **OPTIONS)


def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had written is read, not made again; also where a shard ends within a block."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 8_000)
    source, out = checkpoint("Llama", tmp_path / "source"), tmp_path / "out"
    gptq_run(source, tmp_path / "finished")
    journal = out / "fqcompile.journal"
    process = FORK.Process(target=gptq_run, args=(source, out), daemon=True)
    process.start()
    while not journal.exists() or "layers.1.self_attn" not in journal.read_text():
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    noted = journal.read_text()
    assert "layers.0.mlp.down" in noted and "layers.2.mlp" not in noted
    made: list[int] = []
    compensate = gptq.compensate
    monkeypatch.setattr(gptq, "compensate", lambda *own: made.append(1) or compensate(*own))
    gptq_run(source, out, resume=True)
    assert 0 < len(made) <= 14  # of two layers with seven weights
    assert state_of(out) == state_of(tmp_path / "finished")


@pytest.mark.slow
def test_a_run_that_fails_anywhere_resumes_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 8_000)
    source = checkpoint("Llama", tmp_path / "source")
    operations = count_operations(lambda: gptq_run(source, tmp_path / "count"))
    finished = state_of(tmp_path / "count")
    for fails_at in range(0, operations, 7):
        out = tmp_path / str(fails_at)
        crash(lambda: gptq_run(source, out), fails_at, fails_at)  # noqa: B023
        gptq_run(source, out, resume=True)
        assert state_of(out) == finished


def test_a_model_that_does_not_run_so_is_loaded_whole_if_there_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("Llama", tmp_path / "source")
    forward = hf.LlamaForCausalLM.forward

    def twisted(model: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        """Reads a weight where its block is not called."""
        shift = (model.model.layers[0].mlp.up_proj.weight[0, 0] > 1e9).long()
        return forward(model, input_ids + shift, **more)

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", twisted)
    said: list[str] = []
    given: dict[str, Any] = {"calibration": batches("Llama")[:6], "method": "gptq", **OPTIONS}
    plan = fqcompile.quantize_checkpoint(source, tmp_path / "out", **given, say=said.append)
    assert "does not run block by block" in said[0] and "0.0 GiB" in said[0]
    model = hf.LlamaForCausalLM.from_pretrained(source)
    expected = fqcompile.quantize_(model, **given)
    assert [s.as_dict() for s in plan.sites] == [s.as_dict() for s in expected.sites]
    monkeypatch.setattr(data, "_available_memory", lambda: 1000)
    with pytest.raises(CheckpointError, match="calibration=None") as caught:
        fqcompile.quantize_checkpoint(source, tmp_path / "other", **given)
    assert "available" in str(caught.value) and not (tmp_path / "other").exists()


MEASURED = """
import re, sys
import torch, fqcompile
from fqcompile.checkpoint import shards
torch.set_num_threads(1)
shards.SHARD_BYTES = 1 << 20
batches = list(torch.randint(128, (8, 1, 128), generator=torch.Generator().manual_seed(0)))

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def run(source, out):
    given = {"calibration": batches, "method": sys.argv[4], "granularity": 64}
    fqcompile.quantize_checkpoint(source, out, **given)

# Once, so that all is imported; then the high-water mark begins anew.
run(sys.argv[1], sys.argv[2] + "/first")
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
run(sys.argv[3], sys.argv[2] + "/second")
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_memory_is_that_of_a_block(method: str, tmp_path: Path) -> None:
    """Not that of the model, of 12 blocks of 9 MB: hidden states are 2 MB, second moments 12 MB."""
    torch.manual_seed(0)
    for name, layers in (("small", 1), ("large", 12)):
        sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": layers}
        config = hf.LlamaConfig(**{**WIDE, **sizes})
        frozen(hf.LlamaForCausalLM(config)).save_pretrained(tmp_path / name)
    arguments = [str(tmp_path / name) for name in ("small", "out", "large")]
    command = [sys.executable, "-c", MEASURED, *arguments, method]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    block = 4 * (4 * 512 * 512 - 2 * 512 * 256 + 3 * 512 * 1024)
    print(method, int(printed) / block)
    assert int(printed) < 8 * block, int(printed) / block
