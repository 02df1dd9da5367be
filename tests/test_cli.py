"""The command line as a user meets it: help, doctor, explain, errors, the demo on a tiny model."""

import argparse
import copy
import io
import json
import runpy
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fqcompile.cli import COMMANDS, main
from fqcompile.config import OF_COMPILING
from fqcompile.demo import decoder, embedding, gemma, time_interleaved
from fqcompile.demo.embedding import stdlib_sentences
from tests.dense_models import build as build_dense


def tiny_model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """What `fqcompile explain tests.test_cli:tiny_model` loads."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 8)), (torch.randn(2, 256),)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_argument_of_a_command_is_explained_in_one_line(command: str) -> None:
    parser = argparse.ArgumentParser()
    import_module(f"fqcompile.commands.{command}").add_arguments(parser)
    for action in parser._actions:
        name = "/".join(action.option_strings) or action.dest
        assert action.help and "\n" not in action.help, f"{name} of {command} has no help"
        assert len(action.help) <= 120, f"the help of {name} of {command} is no line"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("quantise", "no command is called 'quantise'; there are demo, "),
        ("quantise", "doctor; did you mean 'quantize'?"),
        ("xyz", "doctor\n"),
        ("plan", "'plan' was renamed; give: fqcompile estimate"),
    ],
)
def test_an_unknown_command_has_the_nearest_name(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--model", "opt-175b"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "explain m:f --bts 8",
            "fqcompile explain: no option is called '--bts'; there are --alpha",
        ),
        ("explain m:f --bts=8", "; did you mean '--bits'?"),
        ("explain m:f --group_size 64", "no option is called '--group_size'; there are "),
        ("quantize IN OUT --overwrit_", "; did you mean '--overwrite'?"),
        ("doctor extra", "doctor: 'extra' is one argument too many; --help shows which it takes"),
        ("demo --rounds 0", "argument --rounds: '0' is not a number from 1 up"),
        ("demo --new-tokens -1", "argument --new-tokens: '-1' is not a number from 1 up"),
        ("estimate --model opt-175b --chunk 0", "argument --chunk: '0' is not a number from 1 up"),
        ("estimate --model opt-175b --machine x", "argument --machine: 'x' is not a number from"),
    ],
)
def test_arguments_are_refused_before_any_work(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1 or error.startswith("usage: ")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert not stopped.value.code
    assert capsys.readouterr().out == f"fqcompile {version('fqcompile')}\n"


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_help_shows_no_option_that_the_command_refuses(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert "--on-unsupported" in printed
    assert not [name for name in OF_COMPILING if f"--{name.replace('_', '-')}" in printed]
    (tmp_path / "config.json").write_text("{}")
    assert main([command, str(tmp_path), str(tmp_path / "out"), "--mode", "default"]) == 2
    assert "option mode is one of compiling" in capsys.readouterr().err


def test_the_module_is_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fqcompile", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fqcompile", run_name="__main__")
    assert not stopped.value.code
    printed = capsys.readouterr().out
    # torch.__version__ may say more: PyPI's wheel of 2.14.1 is 2.14.1+cu130 to itself
    assert f"torch         {version('torch')}\n" in printed
    assert "fqcompile.backend:REGISTERED" in printed
    assert "aten_int4pack" in printed


def test_explain_prints_the_plan_and_writes_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tmp_path = tmp_path / "made" / "anew"
    files = ["--json", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")]
    assert main(["explain", f"{__name__}:tiny_model", "--bits", "8", *files]) == 0
    printed = capsys.readouterr().out
    assert "0.weight" in printed
    assert "int8" in printed
    assert "fewer elements than min_elements=16384" in printed
    sites = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["sites"]
    assert [site["status"] for site in sites] == ["quantized", "kept"]
    assert "0.weight" in (tmp_path / "plan.html").read_text(encoding="utf-8")


def test_explain_takes_lists_and_dicts_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--overrides", '{"0": {"bits": 8}}', "--min-elements", "1"]
    assert main(["explain", f"{__name__}:tiny_model", *flags]) == 0
    printed = capsys.readouterr().out
    assert "int8" in printed
    assert "normal4" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "no/such/place"], "neither a directory with a checkpoint nor"),
        (["explain", f"{__name__}:tiny_model", "--bits", "3"], "option bits is 3"),
        (["explain", f"{__name__}:tiny_model", "--granularity", "colum"], "did you mean 'column'"),
        (
            ["export", "no/such/place", "OUT", "--profile", "vllm"],
            "profile is 'vllm'; allowed: 'portable' (for vllm, sglang, transformers), 'serve' (for",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("flag", ["--html", "--json"])
@pytest.mark.parametrize(
    ("name", "shown"), [("file/x", "/file"), ("/proc/x", "/proc/"), ("x" * 300, "x" * 300)]
)
def test_a_file_that_cannot_be_written_is_one_line(
    flag: str, name: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["explain", f"{__name__}:tiny_model", flag, str(tmp_path / name)]
    assert main(arguments) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said.startswith("fqcompile explain: ") and shown in said
    assert "give a path that can be made" in said


def test_sentences_are_distinct_and_the_same_each_time() -> None:
    sentences = stdlib_sentences(100)
    assert len(set(sentences)) == 100
    assert sentences == stdlib_sentences(100)
    assert all(sentence.endswith(".") for sentence in sentences)


def test_one_round_has_a_time_and_no_spread() -> None:
    (timing,) = time_interleaved({"a": lambda: None}, 1).values()
    assert 0 < timing.p20_ms == timing.median_ms == timing.p80_ms


def test_timing_runs_the_alternatives_in_turn() -> None:
    calls: list[str] = []
    timings = time_interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3
    )
    assert calls == ["a", "b"] * 4
    assert all(t.p20_ms <= t.median_ms <= t.p80_ms for t in timings.values())


@pytest.mark.slow
def test_demo_decodes_with_a_local_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=256,
        word_embed_proj_dim=128,
        vocab_size=512,
    )
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    flags = ["--part", "decoder", "--model", str(tmp_path), "--new-tokens", "4", "--rounds", "1"]
    assert main(["demo", *flags]) == 0
    printed = capsys.readouterr().out
    assert "weights of that checkpoint" in printed
    assert "finequant int4" in printed
    assert "equal" in printed


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("part", ["embedding", "decoder"])
def test_the_demo_says_what_it_does_before_it_compiles(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a pipe too, whose text would wait for a buffer to fill."""

    def stop(*_: object) -> None:
        raise Interrupted

    ids = torch.arange(8)[None]
    sentences = embedding.Sentences(ids, ids)
    monkeypatch.setattr(embedding, "load_embedder", lambda: (lambda s: s.input_ids, sentences))
    monkeypatch.setattr(embedding, "_compile", lambda *_, **__: stop)
    monkeypatch.setattr(decoder, "_generate", stop)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    with pytest.raises(Interrupted):
        if part == "embedding":
            embedding.run_embedding_demo(1)
        else:
            decoder.run_decoder_demo(nn.Linear(2, 2), "small", 4, 1)
    text = written.getvalue().decode()
    assert "about a minute the first time" in text
    assert text.endswith({"embedding": "  int8 ... ", "decoder": "  eager ... "}[part])


def test_the_demo_shows_what_a_model_writes_in_each_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OPTConfig(
        **sizes, ffn_dim=256, word_embed_proj_dim=128, vocab_size=99, max_position_embeddings=32
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(gemma, "PROMPT", "three words here")
    gemma.show_texts(model, Words(), new_tokens=4)
    told = capsys.readouterr().out
    texts = [line.partition(": ")[2].split() for line in told.splitlines()[-6:] if ": " in line]
    with torch.no_grad():
        own = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert [int(word) for word in texts[0]] == own[0, 3:].tolist()
    assert [len(text) for text in texts] == [4, 4, 4]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Words:
    """A tokenizer: three ids for any text, and ids as words."""

    def __call__(self, text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[3, 4, 5]]))

    def decode(self, tokens: torch.Tensor) -> str:
        return " ".join(str(token) for token in tokens.tolist())


@torch.no_grad()
def test_the_demo_does_not_compile_each_token_anew() -> None:
    """The static cache of a sliding window counts tokens in a number that graphs are guarded by."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model, _ = build_dense("gemma3", torch.float32)
    prompt = torch.arange(8)[None] + 10
    compiled = decoder._compiled(model, backend=backend).model
    tokens = decoder._generate(compiled, prompt, 6)
    assert torch.equal(tokens, decoder._generate(model, prompt, 6))
    assert len(graphs) <= 3  # the prompt, a token, and a token at any place
