"""quantize_checkpoint: resumed runs, refusals, what is left out, and how much memory it takes."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf

import fqcompile
from fqcompile.checkpoint import shards
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.cli import main
from fqcompile.errors import CheckpointError, OptionError, UnquantizableWeight
from fqcompile.weights.parameter import PackedWeight
from tests.checkpoint.crashes import count_operations, crash
from tests.children import FORK

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPTIONS: dict[str, Any] = {"min_elements": 2048}


def checkpoint(directory: Path, **changes: Any) -> Path:
    """A small Mixtral, in several files, with a tokenizer's file beside them."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(**{**SIZES, **MOE, **changes})
    model = hf.MixtralForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(directory, max_shard_size="60KB")
    (directory / "tokenizer.json").write_text('{"made": "up"}')
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def _several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)


def state_of(directory: Path) -> dict[str, Any]:
    """Everything in a finished directory, but for the names of its files."""
    manifest = read_manifest(directory)
    expected = {"fqcompile.json", *manifest.files, *(shard.file for shard in manifest.shards)}
    assert {path.name for path in directory.iterdir()} == expected
    content = json.loads((directory / "fqcompile.json").read_text())["content"]
    del content["generation"]
    for shard in content["shards"]:
        shard["file"] = shard["file"][-len("00000.safetensors") :]
    data = [(directory / shard.file).read_bytes() for shard in manifest.shards]
    own = manifest.generation.encode()  # in the names of shards, which the index has
    others = {name: (directory / name).read_bytes().replace(own, b"") for name in manifest.files}
    return {"content": content, "data": data, "others": others}


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 20_000)
        fqcompile.quantize_checkpoint(source, out, **OPTIONS)
    state = state_of(out)
    assert len(state["data"]) > 5
    return state


@pytest.mark.slow
def test_a_run_that_fails_anywhere_resumes_to_the_same_files(
    source: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    def run(out: Path, **how: Any) -> None:
        fqcompile.quantize_checkpoint(source, out, **how, **OPTIONS)

    operations = count_operations(lambda: run(tmp_path / "count"))
    rng = random.Random(0)
    for fails_at in range(operations):
        out = tmp_path / str(fails_at)
        assert crash(lambda: run(out), fails_at, fails_at)  # noqa: B023
        if rng.random() < 0.3:  # and once more
            crash(lambda: run(out, resume=True), rng.randrange(operations), fails_at)  # noqa: B023
        if not (out / "fqcompile.json").exists():
            with pytest.raises(CheckpointError, match=r"has no fqcompile\.json"):
                fqcompile.load(None, out)
        run(out, resume=True)
        assert state_of(out) == finished
        shutil.rmtree(out)


def test_a_resumed_run_quantizes_nothing_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = count_operations(
        lambda: fqcompile.quantize_checkpoint(source, tmp_path / "count", **OPTIONS)
    )
    out = tmp_path / "out"
    crash(lambda: fqcompile.quantize_checkpoint(source, out, **OPTIONS), operations // 2, 0)
    journal = (out / "fqcompile.journal").read_text().split("\n")[:-1]  # whole lines
    noted = {name for line in journal[1:] for name in json.loads(line)["packed"]}
    assert noted
    quantized = []
    original = shards.ShardWriter.add_packed

    def spy(writer: Any, name: str, *rest: Any, **named: Any) -> Any:
        quantized.append(name)
        return original(writer, name, *rest, **named)

    monkeypatch.setattr(shards.ShardWriter, "add_packed", spy)
    plan = fqcompile.quantize_checkpoint(source, out, resume=True, **OPTIONS)
    assert not noted & set(quantized)
    assert noted | set(quantized) == {site.name for site in plan.quantized}
    assert not (out / "fqcompile.journal").exists()


def test_a_process_that_is_killed_resumes(
    source: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    for _ in range(2):
        begun = FORK.Event()

        def work(begun: Any = begun) -> None:
            begun.set()
            fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **OPTIONS)

        process = FORK.Process(target=work, daemon=True)
        process.start()
        assert begun.wait(60)
        time.sleep(0.02)  # of about 0.1 s of work
        process.kill()
        process.join()
    fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **OPTIONS)
    assert state_of(tmp_path) == finished


def test_resuming_what_is_finished_or_was_never_begun(
    source: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    first = fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert state_of(tmp_path) == finished
    assert json.loads(second.to_json()) == json.loads(first.to_json())


def _unfinished(source: Path, out: Path) -> None:
    crash(lambda: fqcompile.quantize_checkpoint(source, out, **OPTIONS), 40, 0)
    assert (out / "fqcompile.journal").exists()
    assert not (out / "fqcompile.json").exists()


def test_existing_directories_are_left_alone_unless_told(
    source: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    _unfinished(source, tmp_path)
    with pytest.raises(CheckpointError, match=r"unfinished run; give resume=True"):
        fqcompile.quantize_checkpoint(source, tmp_path, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"of another run: .* other options"):
        fqcompile.quantize_checkpoint(source, tmp_path, resume=True, bits=8, **OPTIONS)
    fqcompile.quantize_checkpoint(source, tmp_path, overwrite=True, bits=8, **OPTIONS)
    assert state_of(tmp_path) != finished
    for how in ({}, {"resume": True}):
        with pytest.raises(CheckpointError, match=r"holds a quantized model; give overwrite=True"):
            fqcompile.quantize_checkpoint(source, tmp_path, **how, **OPTIONS)
    with pytest.raises(OptionError, match="choose one"):
        fqcompile.quantize_checkpoint(source, tmp_path, resume=True, overwrite=True)
    fqcompile.quantize_checkpoint(source, tmp_path, overwrite=True, **OPTIONS)
    assert state_of(tmp_path) == finished


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_of_something_else_are_not_replaced_unless_told(
    name: str, source: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    for how in ({}, {"resume": True}):
        with pytest.raises(CheckpointError, match=rf"{name} would be replaced, .* overwrite=True"):
            fqcompile.quantize_checkpoint(source, tmp_path, **how, **OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == "mine"
    fqcompile.quantize_checkpoint(source, tmp_path, overwrite=True, **OPTIONS)
    assert state_of(tmp_path) == finished


def test_an_overwritten_model_stays_whole_until_the_end(
    source: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    fqcompile.quantize_checkpoint(source, tmp_path, bits=8, **OPTIONS)
    old = state_of(tmp_path)

    def replace() -> None:
        fqcompile.quantize_checkpoint(source, tmp_path, overwrite=True, **OPTIONS)

    crash(replace, 40, 0)
    assert read_manifest(tmp_path).options["bits"] == 8
    fqcompile.load(None, tmp_path)
    fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **OPTIONS)
    assert state_of(tmp_path) == finished
    assert old != finished


def test_a_changed_source_is_not_resumed(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    _unfinished(copy, tmp_path / "out")
    path = sorted(copy.glob("*.safetensors"))[0]
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="of another run: another checkpoint"):
        fqcompile.quantize_checkpoint(copy, tmp_path / "out", resume=True, **OPTIONS)


def test_a_damaged_shard_is_not_resumed(source: Path, tmp_path: Path) -> None:
    _unfinished(source, tmp_path)
    # One that the journal calls finished; there may be another, which is written again.
    lines = (tmp_path / "fqcompile.journal").read_text().splitlines()
    finished = [shard["file"] for line in lines[1:] for shard in json.loads(line)["shards"]]
    (tmp_path / finished[0]).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is not as fqcompile\.journal says"):
        fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **OPTIONS)


def test_a_journal_that_names_what_no_run_wrote_is_not_resumed(
    source: Path, tmp_path: Path
) -> None:
    _unfinished(source, tmp_path)
    journal = tmp_path / "fqcompile.journal"
    text = journal.read_text()
    shard = re.search(r"fqcompile-([0-9a-f]{8})-\d{5}\.safetensors", text)
    assert shard is not None
    for old, new, message in (
        (shard[0], "x" * 300, "is not as fqcompile.journal says"),
        (shard[0], "../" + shard[0], "is not as fqcompile.journal says"),
        (f'"generation":"{shard[1]}"', f'"generation":"{"x" * 300}"', "has the generation 'xxx"),
    ):
        assert old in text
        journal.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **OPTIONS)


def test_configs_and_tokenizer_come_along(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fqcompile.quantize_checkpoint(source, tmp_path / "out", **OPTIONS)
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == '{"made": "up"}'
    assert hf.AutoConfig.from_pretrained(out).num_local_experts == 4
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    shards_named = {shard.file for shard in read_manifest(out).shards}
    assert set(index.values()) == shards_named and "lm_head.weight" in index


def test_options_and_types_reach_the_weights(source: Path, tmp_path: Path) -> None:
    plan = fqcompile.quantize_checkpoint(
        source,
        tmp_path,
        dtype=torch.float16,
        exclude=["q_proj"],
        overrides={"down_proj": {"bits": 8, "granularity": 32}},
        **OPTIONS,
    )
    loaded = fqcompile.load(None, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    assert loaded.config.dtype == torch.float16
    layer: Any = loaded.model.layers[0]
    assert not isinstance(layer.self_attn.q_proj.weight, PackedWeight)
    assert layer.mlp.experts.down_proj.format.bits == 8
    assert layer.mlp.experts.down_proj.format.group_size == 32
    reasons = {site.name: site.reason for site in plan.kept}
    assert "exclude" in str(reasons["model.layers.0.self_attn.q_proj.weight"])


def _changed(source: Path, target: Path, change: Any) -> Path:
    """The checkpoint in one file, after `change(tensors)`."""
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(target.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (target / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


def test_weights_that_cannot_be_quantized_stay_or_raise(source: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        assert EXPERT in tensors, sorted(tensors)
        tensors[EXPERT][3, 4] = float("nan")

    spoilt = _changed(source, tmp_path / "spoilt", spoil)
    plan = fqcompile.quantize_checkpoint(spoilt, tmp_path / "out", **OPTIONS)
    (site,) = [s for s in plan.kept if s.reason and "expert 2" in s.reason]
    assert site.name == "model.layers.0.mlp.experts.gate_up_proj"
    kept = fqcompile.load(None, tmp_path / "out").get_parameter(site.name)
    assert not isinstance(kept, PackedWeight)
    assert kept.isnan().sum() == 1
    with pytest.raises(UnquantizableWeight, match=r"gate_up_proj: expert 2: .* NaN"):
        fqcompile.quantize_checkpoint(
            spoilt, tmp_path / "raises", on_unsupported="error", **OPTIONS
        )


def test_tensors_of_no_use_are_named(source: Path, tmp_path: Path) -> None:
    more = _changed(source, tmp_path / "more", lambda t: t.update(extra=torch.ones(2)))
    said: list[str] = []
    fqcompile.quantize_checkpoint(more, tmp_path / "out", say=said.append, **OPTIONS)
    assert any("has no place for them: extra" in line for line in said)
    assert any("million weights in" in line for line in said)


@pytest.mark.parametrize("same", [True, False], ids=["equal", "different"])
def test_tied_tensors_that_are_there_twice(tmp_path: Path, same: bool) -> None:
    """Tied where they are equal, as from_pretrained does; also where both stay dense."""
    config = hf.LlamaConfig(**SIZES, tie_word_embeddings=True)
    model = hf.LlamaForCausalLM(config)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    if not same:
        tensors["lm_head.weight"] += 1
    model.save_pretrained(tmp_path / "in")
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    reference = hf.LlamaForCausalLM.from_pretrained(tmp_path / "in")
    options = {**OPTIONS, "exclude": ["lm_head", "embed_tokens"]}
    fqcompile.quantize_(reference, **options)
    fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out", **options)
    loaded: Any = fqcompile.load(None, tmp_path / "out")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == same
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, PackedWeight):
            assert torch.equal(loaded.get_parameter(name), parameter)


def _without(key: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return change


def test_checkpoints_that_lack_tensors_are_refused(source: Path, tmp_path: Path) -> None:
    less = _changed(source, tmp_path / "less", _without("model.norm.weight"))
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors of MixtralForCausalLM: model\.norm"
    ):
        fqcompile.quantize_checkpoint(less, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fewer = _changed(source, tmp_path / "fewer", _without(EXPERT))
    with pytest.raises(CheckpointError, match=r"cannot become .*gate_up_proj"):
        fqcompile.quantize_checkpoint(fewer, tmp_path / "out")


def test_tensors_of_another_shape_are_refused(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(3)

    wrong = _changed(source, tmp_path / "wrong", change)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight is \[3\] in the checkpoint and \[64\]"
    ):
        fqcompile.quantize_checkpoint(wrong, tmp_path / "out")


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", str(source), out, "--min-elements", "2048", "--bits", "8"]) == 0
    printed = capsys.readouterr().out
    assert "million a second" in printed
    assert "int8" in printed
    assert "model.layers.0.mlp.experts.gate_up_proj" in printed
    assert fqcompile.load(None, out).training is False
    assert main(["quantize", str(source), out]) == 2
    assert "give overwrite=True (--overwrite)" in capsys.readouterr().err
    assert main(["quantize", str(source), out, "--overwrite", "--dtype", "fp16"]) == 0
    assert main(["quantize", str(tmp_path), out, "--resume"]) == 2
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--levels", "uniform"]], ids=str)
def test_the_command_takes_levels(source: Path, tmp_path: Path, flags: list[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--min-elements", "2048", *flags]) == 0
    levels = flags[1] if flags else "normal"
    written = read_manifest(out)
    found = {(record.bits, record.levels) for record in written.packed.values()}
    assert found - {(8, "uniform")} == {(4, levels)}
    quantized = {row["name"]: row["levels"] for row in written.sites if row["bits"]}
    model = fqcompile.load(None, out)
    for name, w in model.named_parameters():
        if isinstance(w, PackedWeight):
            assert w.format.levels == quantized[name]


MEASURED = """
import re, sys
import torch, fqcompile
from fqcompile.checkpoint import shards
torch.set_num_threads(1)
shards.SHARD_BYTES = 4 << 20

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

# Once, so that all is imported; then the high-water mark begins anew.
fqcompile.quantize_checkpoint(sys.argv[1], sys.argv[2] + "/first", granularity=128)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
fqcompile.quantize_checkpoint(sys.argv[3], sys.argv[2] + "/second", granularity=128)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor(source: Path, tmp_path: Path) -> None:
    """Not that of the checkpoint: stacks of up to 17 MB, of 130 tensors in all."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 5}
    large = checkpoint(tmp_path / "large", **sizes, num_local_experts=8, tie_word_embeddings=True)
    nbytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out"), str(large)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = 8 * 2 * 1024 * 512 * 2
    assert nbytes > 7 * stack
    assert int(printed) < 4 * stack, int(printed) / stack
