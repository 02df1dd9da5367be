"""export: killed runs, refusals, what is written dense and why, tensor parallelism, the command."""

import errno
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

import fqcompile
import fqcompile.integrations.transformers
from fqcompile.checkpoint import shards
from fqcompile.checkpoint.manifest import PartsRecord, read_manifest
from fqcompile.cli import main
from fqcompile.errors import CheckpointError, OptionError, UnquantizableWeight
from fqcompile.interop import export_blocks, export_contents, export_directory
from fqcompile.weights.parameter import PackedWeight
from tests.checkpoint.crashes import count_operations, crash
from tests.interop.models import make, save_quantized, tensors_of
from tests.tiers import examples


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral, not quantized."""
    directory = tmp_path_factory.mktemp("plain")
    make("mixtral", directory)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized."""
    directory = tmp_path_factory.mktemp("saved")
    save_quantized(make("mixtral", directory / "plain")[0], directory / "saved")
    return directory / "saved"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_directory, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["saved", "plain"])
def test_an_export_that_fails_anywhere_resumes_to_the_same_files(
    kind: str, saved: Path, plain: Path, tmp_path: Path
) -> None:
    source, options = (saved, {}) if kind == "saved" else (plain, {"min_elements": 1024})
    samples = examples(12 if kind == "saved" else 4)

    def run(out: Path, **how: Any) -> None:
        fqcompile.export(source, out, **how, **options)

    operations = count_operations(lambda: run(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".safetensors")]) > 3
    rng = random.Random(0)
    for fails_at in sorted(rng.sample(range(operations), samples)):
        out = tmp_path / str(fails_at)
        assert crash(lambda: run(out), fails_at, fails_at)  # noqa: B023
        if out.exists():  # it failed at the very end
            found = files(out)
            found.pop("export.json", None)
        else:
            run(out, resume=True)
            found = files(out)
        assert found == whole
        assert not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.usefixtures("small_shards")
def test_finished_shards_are_not_written_again(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    operations = count_operations(lambda: fqcompile.export(saved, tmp_path / "whole"))
    assert crash(lambda: fqcompile.export(saved, out), operations * 3 // 4, 0)
    partial = tmp_path / "out.partial"
    before = {p.name: p.stat().st_mtime_ns for p in partial.glob("model-*.safetensors")}
    assert before
    fqcompile.export(saved, out, resume=True)
    after = {name: (out / name).stat().st_mtime_ns for name in before}
    kept = [name for name in before if after[name] == before[name]]
    assert len(kept) >= len(before) - 1  # the power failure may have cut the last


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("others", [{"profile": "serve"}, {"tp": 2}])
def test_only_the_same_export_is_resumed(
    others: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert crash(lambda: fqcompile.export(saved, out), 30, 0)
    assert (tmp_path / "out.partial" / "export.json").is_file()
    with pytest.raises(CheckpointError, match="is of another export: another source, or other"):
        fqcompile.export(saved, out, resume=True, **others)
    fqcompile.export(saved, out, resume=True)


@pytest.mark.usefixtures("small_shards")
def test_index_names_every_tensor_and_its_file(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fqcompile.export(saved, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = tensors_of(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"].values()) == {p.name for p in out.glob("*.safetensors")}


def test_what_is_there_is_never_overwritten(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fqcompile.export(saved, out)
    with pytest.raises(CheckpointError, match="is there already; give another directory"):
        fqcompile.export(saved, out)
    shutil.rmtree(out)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"unfinished export; give resume=True \(--resume\)"):
        fqcompile.export(saved, out)
    (tmp_path / "out.partial" / "export.json").write_text('"another"')
    with pytest.raises(CheckpointError, match="is of another export"):
        fqcompile.export(saved, out, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "to is 'gguf'; allowed: 'compressed-tensors'"),
        ({"profile": "all"}, "profile is 'all'; allowed: 'portable' .*, 'serve' "),
        ({"tp": 0}, "tp is 0; allowed: an int >= 1"),
        ({"tp": True}, "tp is True; allowed: an int >= 1"),
        ({"bits": 8}, "option bits is one of quantizing, and .* is quantized already"),
        ({"dtype": torch.float16}, "option dtype is one of quantizing"),
        ({"bitz": 8}, "option bitz is one of quantizing"),
    ],
)
def test_options_that_are_not_allowed(
    options: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        fqcompile.export(saved, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_option_of_quantizing_is_refused_before_any_work(
    plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="did you mean 'bits'"):
        fqcompile.export(plain, tmp_path / "out", bitz=8)  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Llama with groups of 16 in one layer's v_proj, and a k_proj that is not quantized."""
    directory = tmp_path_factory.mktemp("odd")
    model, _ = make("llama", directory / "plain")
    oracle = save_quantized(
        model,
        directory / "saved",
        overrides={r"0.*v_proj": {"granularity": 16}},
        exclude=["1.*k_proj", "lm_head"],
    )
    return directory / "saved", oracle


def test_what_no_engine_has_a_kernel_for_is_dense_with_the_same_values(
    odd: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_blocks, "_PART", 1000)  # seven rows at once
    source, oracle = odd
    plan = fqcompile.export(source, tmp_path / "out")
    reasons = {site.name.removeprefix("model.layers."): site.reason for site in plan.kept}
    why = "written dense, as its int4 codes say: "
    group = "no group size of (128, 64, 32) divides both K = 128 and its own group size 16"
    for own in ("q_proj", "k_proj", "v_proj"):
        assert reasons[f"0.self_attn.{own}.weight"] == f"{why}v_proj beside it: {group}"
    partner = f"{why}k_proj of one fused layer is not quantized"
    assert reasons["1.self_attn.q_proj.weight"] == partner
    tensors = tensors_of(tmp_path / "out")
    for layer in ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj"):
        name = f"model.layers.{layer}.weight"
        assert torch.equal(tensors[name], oracle.get_parameter(name))
    with pytest.raises(UnquantizableWeight, match=r"0\.self_attn\.q_proj\.weight: written dense"):
        fqcompile.export(source, tmp_path / "strict", on_unsupported="error")
    assert not (tmp_path / "strict.partial").exists()


def test_a_profile_that_would_not_load_is_refused(tmp_path: Path) -> None:
    model, _ = make("mixtral", tmp_path / "plain")
    save_quantized(model, tmp_path / "saved", exclude=["experts", "lm_head"])
    with pytest.raises(CheckpointError, match="experts are dense in a checkpoint") as error:
        fqcompile.export(tmp_path / "saved", tmp_path / "out")
    assert "transformers refused: model.layers.0.block_sparse_moe.experts" in str(error.value)
    assert "--profile serve" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    plan = fqcompile.export(tmp_path / "saved", tmp_path / "out", profile="serve")
    assert len(plan.quantized) == 8


def test_everything_dense_is_in_ignore(tmp_path: Path) -> None:
    model, _ = make("gpt-oss", tmp_path / "plain")
    save_quantized(model, tmp_path / "saved", exclude=["lm_head", r"1\.self_attn\.o_proj"])
    fqcompile.export(tmp_path / "saved", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == [
        "lm_head",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.router",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.router",
        "model.layers.1.self_attn.o_proj",
    ]


def test_a_model_of_which_nothing_can_be_exported_is_refused(tmp_path: Path) -> None:
    save_quantized(make("gpt2", tmp_path / "plain")[0], tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"it is \[K, N\] in the checkpoint, and the format"):
        fqcompile.export(tmp_path / "saved", tmp_path / "out")


def test_weights_of_normal_levels_are_written_dense_with_the_reason(tmp_path: Path) -> None:
    """The format has uniform levels alone; no codes of these exist."""
    model, _ = make("llama", tmp_path / "plain")
    own = {"levels": "normal", "overrides": {"mlp": {"levels": "uniform", "granularity": 32}}}
    oracle = save_quantized(model, tmp_path / "saved", **own)
    plan = fqcompile.export(tmp_path / "saved", tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    sites = {site.name: site for site in plan.sites}
    mixed = {name: "mlp" in name for name in sites if "layers" in name}
    assert set(mixed.values()) == {True, False}
    for name, is_uniform in mixed.items():
        site = sites[name]
        assert site.levels == ("uniform" if is_uniform else None)
        if not is_uniform:
            assert "its normal4 codes say: " in str(site.reason)
            assert "its levels are normal" in str(site.reason)
            assert torch.equal(written[name], oracle.state_dict()[name])
        assert (name in written) != is_uniform
    with pytest.raises(UnquantizableWeight, match="quantize with levels='uniform'"):
        fqcompile.export(tmp_path / "saved", tmp_path / "none", on_unsupported="error")


def test_a_model_of_normal_levels_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save_quantized(make("llama", tmp_path / "plain")[0], tmp_path / "saved", levels="normal",
                   overrides={})  # fmt: skip
    with pytest.raises(CheckpointError, match="export the checkpoint that it was made from"):
        fqcompile.export(tmp_path / "saved", tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_table_is_written_dense_with_the_reason(tied: bool, tmp_path: Path) -> None:
    """Also where the head shares it, and the plan has the weight under the head's name."""
    model, _ = make("llama", tmp_path / "plain")
    model.config.tie_word_embeddings = tied
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    oracle = save_quantized(model, tmp_path / "saved", quantize_embeddings=8, exclude=[])
    table, ids = "model.embed_tokens.weight", torch.arange(9)[None]
    assert isinstance(model.get_parameter(table), PackedWeight)
    plan = fqcompile.export(tmp_path / "saved", tmp_path / "out")
    site = plan.site("lm_head.weight" if tied else table)
    assert site.status == "kept" and str(site.reason) == (
        "written dense, as its int8 codes say: engines keep embedding tables dense"
    )
    assert torch.equal(tensors_of(tmp_path / "out")[table], oracle.get_parameter(table))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    loaded = fqcompile.load(None, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded.get_input_embeddings()(ids), oracle.get_input_embeddings()(ids))
    with pytest.raises(OptionError, match="quantize_embeddings is 8, and engines keep tables"):
        fqcompile.export(tmp_path / "plain", tmp_path / "again", quantize_embeddings=8)


def test_an_original_is_quantized_to_uniform_levels(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")
    said: list[str] = []
    options: dict[str, Any] = {"min_elements": 1024, "granularity": 32}
    plan = fqcompile.export(tmp_path / "plain", tmp_path / "out", say=said.append, **options)
    assert {site.levels for site in plan.quantized} == {"uniform"}
    assert any("uniform levels alone" in line for line in said)
    fqcompile.export(tmp_path / "plain", tmp_path / "same", **options, levels="uniform")
    assert files(tmp_path / "same") == files(tmp_path / "out")


@pytest.mark.few(3)
@pytest.mark.parametrize("name", "llama gemma3 phi3 gpt2 mixtral gpt-oss llama4".split())
def test_what_save_pretrained_wrote_is_exported_as_what_save_wrote(
    name: str, tmp_path: Path
) -> None:
    model, _ = make(name, tmp_path / "plain")
    save_quantized(model, tmp_path / "saved")
    opened = type(model).from_pretrained(tmp_path / "saved")
    opened.save_pretrained(tmp_path / "packed", max_shard_size="100KB")
    (tmp_path / "packed" / "tokenizer.json").write_text('{"made": "up"}')
    if name == "gpt2":
        with pytest.raises(CheckpointError, match=f"nothing of {tmp_path / 'packed'} can be"):
            fqcompile.export(tmp_path / "packed", tmp_path / "none")
        return
    for source in ("saved", "packed"):
        fqcompile.export(tmp_path / source, tmp_path / f"of-{source}")
    written = files(tmp_path / "of-packed")
    assert written.pop("tokenizer.json") == b'{"made": "up"}'
    assert written == files(tmp_path / "of-saved")
    with pytest.raises(CheckpointError, match=r"save_pretrained writes them; write it .* export"):
        fqcompile.check(tmp_path / "packed")
    with pytest.raises(OptionError, match=r"option bits is one of quantizing, and .* is quantized"):
        fqcompile.export(tmp_path / "packed", tmp_path / "none", bits=8)


@pytest.mark.parametrize(
    "options", [{"levels": "normal"}, {"overrides": {"mlp": {"levels": "normal"}}}], ids=str
)
def test_normal_levels_cannot_be_asked_of_an_export(
    plain: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="compressed-tensors has uniform levels alone"):
        fqcompile.export(plain, tmp_path / "out", **options)


def test_models_of_our_own_and_other_directories_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    fqcompile.quantize_(model, min_elements=1)
    fqcompile.save(model, tmp_path / "own")
    with pytest.raises(CheckpointError, match="Sequential, which is not a model class"):
        fqcompile.export(tmp_path / "own", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        fqcompile.export(tmp_path / "nothing", tmp_path / "out")


def test_what_several_ranks_saved_is_to_be_saved_whole_first(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_manifest(saved)
    parts = PartsRecord((2, 2), 0, ("a", "b"), ((0, 1), (1, 2)))
    in_parts = replace(whole, sharded={"model.layers.0.weight": parts})
    monkeypatch.setattr(export_contents, "read_manifest", lambda directory: in_parts)
    with pytest.raises(CheckpointError, match=r"saved by several ranks.*fqcompile.save\(fqcompile"):
        fqcompile.export(saved, tmp_path / "out")


def test_groups_do_not_cross_the_devices_of_tensor_parallelism(tmp_path: Path) -> None:
    model, _ = make("llama", tmp_path / "plain")
    save_quantized(model, tmp_path / "saved", granularity="column", overrides={})
    one = fqcompile.export(tmp_path / "saved", tmp_path / "one")
    assert {site.group_size for site in one.quantized} == {128, 256}
    fqcompile.export(tmp_path / "saved", tmp_path / "four", tp=4)
    for engine in ("vllm", "sglang"):
        found = fqcompile.check(tmp_path / "four", engine, tp=4)
        assert [f for f in found if f.effect != "slow"] == []


def test_command_exports_and_checks(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    options = ["--profile", "serve", "--min-elements", "1024", "--bits", "4"]
    assert main(["export", str(plain), out, *options]) == 0
    assert "exported" in capsys.readouterr().out
    assert main(["check", out, "--engine", "sglang"]) == 0
    assert main(["check", out, "--tp", "16", "--json"]) == 2
    printed = capsys.readouterr()
    assert "would not load" in printed.err
    text = printed.out[printed.out.index("[\n") :]
    assert {"refused"} <= {finding["effect"] for finding in json.loads(text)}


@pytest.mark.parametrize(
    "names",
    [["thesis.txt"], ["model.safetensors"], ["config.json", "notes/a.txt"], ["quantized/a.txt"]],
)
@pytest.mark.parametrize("resume", [False, True])
def test_what_no_export_wrote_is_left_alone(
    resume: bool, names: list[str], saved: Path, tmp_path: Path
) -> None:
    """A directory that happens to have the name: nothing there is removed or taken as finished."""
    partial = tmp_path / "out.partial"
    for name in names:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text("mine")
    for source in (saved, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"and no export\.json, so no export has written"):
            fqcompile.export(source, tmp_path / "out", resume=resume)
    assert {p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file()} == set(
        names
    )
    assert all((partial / name).read_text() == "mine" for name in names)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_directory_is_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file, and exports are written there"):
        fqcompile.export(saved, tmp_path / "out", resume=True)
    assert (tmp_path / "out.partial").read_text() == "mine"


@pytest.mark.parametrize("fails", [True, False])
def test_files_put_into_the_directory_of_the_quantized_stay(
    fails: bool, plain: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def write(text: str) -> None:  # while it runs
        if (partial / "quantized").exists():
            (partial / "quantized" / "notes.txt").write_text("mine")

    options: dict[str, Any] = {"min_elements": 1024, "say": write}
    if fails:
        with pytest.raises(CheckpointError, match="there is nothing to export"):
            fqcompile.export(plain, out, exclude=[".*"], **options)
    else:
        fqcompile.export(plain, out, **options)
    left = (partial if fails else out) / "quantized"
    assert {path.name for path in left.iterdir()} == {"notes.txt"}


@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
@pytest.mark.parametrize("kind", ["saved", "plain"])
def test_an_export_is_written_where_a_link_leads(
    there: bool, kind: str, saved: Path, plain: Path, tmp_path: Path
) -> None:
    """The link itself cannot become the directory, nor be replaced by it."""
    source, options = (saved, {}) if kind == "saved" else (plain, {"min_elements": 1024})
    (tmp_path / "disk").mkdir()
    real, out = tmp_path / "disk" / "real", tmp_path / "out"
    if there:
        real.mkdir()
    out.symlink_to(real)
    fqcompile.export(source, out, **options)
    fqcompile.export(source, tmp_path / "whole", **options)
    assert out.is_symlink() and files(real) == files(tmp_path / "whole")
    assert {p.name for p in tmp_path.rglob("*.partial")} == set()


@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_a_link_in_place_of_the_unfinished_directory_is_refused(
    there: bool, saved: Path, tmp_path: Path
) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "real")
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="is a link, and exports are written there"):
            fqcompile.export(saved, tmp_path / "out", resume=resume)
    assert (tmp_path / "out.partial").is_symlink() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file/x", "/proc/x", "x" * 300, "loop"])
@pytest.mark.parametrize("command", ["export", "quantize"])
def test_where_nothing_can_be_written_is_one_line(
    command: str,
    name: str,
    saved: Path,
    plain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    source = saved if command == "export" else plain
    assert main([command, str(source), str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in said and "cannot be written" in said and "give a directory that" in said


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_keeps_what_is_finished(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be made room on; going on then ends the same."""
    options: dict[str, Any] = {"min_elements": 1024}
    fqcompile.export(plain, tmp_path / "whole", **options)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*a disk with room"):
            fqcompile.export(plain, tmp_path / "out", **options)
    left = {path.name for path in (tmp_path / "out.partial").rglob("*.safetensors")}
    assert left
    fqcompile.export(plain, tmp_path / "out", resume=True, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_files_put_beside_an_unfinished_export(saved: Path, tmp_path: Path) -> None:
    """They are neither lost nor taken for shards."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    operations = count_operations(lambda: fqcompile.export(saved, tmp_path / "whole"))
    assert crash(lambda: fqcompile.export(saved, out), operations // 2, 0)
    (partial / "notes.txt").write_text("mine")
    shard = sorted(path.name for path in (tmp_path / "whole").glob("model-*.safetensors"))[-1]
    assert not (partial / shard).exists()
    (partial / shard).write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="is not what this export has written"):
        fqcompile.export(saved, out, resume=True)
    assert (partial / "notes.txt").read_text() == "mine"
    assert (partial / shard).read_bytes() == b"mine"
    (partial / shard).unlink()
    fqcompile.export(saved, out, resume=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert files(out) == files(tmp_path / "whole")


def test_a_journal_that_is_none(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "export.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match=r"export\.json is not JSON"):
        fqcompile.export(saved, tmp_path / "out", resume=True)


def test_a_failed_export_keeps_what_is_not_its_own(plain: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()

    def write(text: str) -> None:  # while it runs
        (partial / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="there is nothing to export"):
        fqcompile.export(plain, tmp_path / "out", resume=True, exclude=[".*"], say=write)
    assert {path.name for path in partial.iterdir()} == {"notes.txt", "export.json"}


def test_the_config_names_the_version_that_reads_it(tmp_path: Path) -> None:
    """Experts need a later compressed-tensors in transformers than linears."""
    for name, version in (("llama", "0.17.0"), ("mixtral", "0.20.0")):
        model, _ = make(name, tmp_path / name)
        save_quantized(model, tmp_path / f"{name}-saved")
        fqcompile.export(tmp_path / f"{name}-saved", tmp_path / f"{name}-out")
        config = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        assert config["quantization_config"]["version"] == version
