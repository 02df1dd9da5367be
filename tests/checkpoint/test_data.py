"""Checkpoints quantized by data: as `quantize_` on the loaded model, from a text, resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import fqcompile
from fqcompile.checkpoint import data
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.cli import main
from fqcompile.errors import OptionError
from tests.helpers import frozen

OPTIONS: dict[str, Any] = {"min_elements": 2048, "granularity": 32}
WORDS = 96


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and its tokenizer, which knows the words w0, w1, ..."""
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        vocab_size=128, initializer_range=0.1,
    )  # fmt: skip
    frozen(hf.LlamaForCausalLM(config)).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(WORDS, (5 * 512 + 100,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def text(ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{n}" for n in ids.tolist()))
    return file


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in fqcompile.restore(model).named_parameters()}


def test_a_text_is_what_its_tokens_are(
    source: Path, text: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """In whole sequences of 512; the directory loads as any other, its tokenizer too."""
    model = hf.LlamaForCausalLM.from_pretrained(source)
    batches = list(ids[: 5 * 512].view(5, 1, 512))
    expected = fqcompile.quantize_(model, calibration=batches, method="gptq", **OPTIONS)
    arguments = ["--min-elements", "2048", "--granularity", "32"]
    command = ["quantize", str(source), str(tmp_path / "out"), *arguments]
    assert main([*command, "--method", "gptq", "--calibration", str(text)]) == 0
    rows = {row["name"]: row["calibration"] for row in read_manifest(tmp_path / "out").sites}
    assert rows == {site.name: site.calibration for site in expected.sites}
    assert "batches; gptq" in rows.values()
    loaded = parameters_of(fqcompile.load(None, tmp_path / "out"))
    for name, values in parameters_of(model).items():
        assert torch.equal(loaded[name], values), name
    assert len(hf.AutoTokenizer.from_pretrained(tmp_path / "out")) == WORDS


def test_a_tokenizer_in_python_gives_whole_sequences_too(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    hf.ByT5Tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "text.txt"
    file.write_text("many words, " * 100)
    ids = torch.tensor(list(file.read_bytes())) + 3  # each byte is a token, behind three others
    pieces = [torch.cat([piece, torch.tensor([1])])[None] for piece in ids.split(511)]
    model = hf.LlamaForCausalLM.from_pretrained(source)
    expected = fqcompile.quantize_(model, calibration=pieces[:2], **OPTIONS)
    plan = fqcompile.quantize_checkpoint(tmp_path, tmp_path / "out", calibration=file, **OPTIONS)
    rows = [(site.name, site.calibration_rows) for site in plan.sites]
    assert rows == [(site.name, site.calibration_rows) for site in expected.sites]
    assert {site.calibration_rows for site in plan.quantized if site.bits == 4} == {1024}
    loaded = parameters_of(fqcompile.load(None, tmp_path / "out"))
    for name, values in parameters_of(model).items():
        assert torch.equal(loaded[name], values), name


def test_a_finished_run_is_not_repeated_and_other_data_is_another_run(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {**OPTIONS, "calibration": text, "method": "gptq"}
    first = fqcompile.quantize_checkpoint(source, tmp_path, **chosen)
    monkeypatch.setattr(data, "quantize_", None)  # is not called
    again = fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **chosen)
    assert [site.as_dict() for site in again.sites] == [site.as_dict() for site in first.sites]
    for other in ({"method": "scale"}, {"calibration": [torch.arange(90)[None]]}):
        with pytest.raises(fqcompile.CheckpointError, match="overwrite"):
            fqcompile.quantize_checkpoint(source, tmp_path, resume=True, **chosen | other)


def test_export_quantizes_by_data(source: Path, text: Path, tmp_path: Path) -> None:
    errors = {}
    exact = hf.LlamaForCausalLM.from_pretrained(source)
    tokens = torch.randint(WORDS, (4, 200), generator=torch.Generator().manual_seed(8))
    for method in ("scale", "gptq"):
        out = tmp_path / method
        given: dict[str, Any] = {**OPTIONS, "calibration": text, "method": method}
        plan = fqcompile.export(source, out, **given)
        assert {site.levels for site in plan.quantized} == {"uniform"}
        assert {path.name for path in out.iterdir()} >= {"config.json", "tokenizer.json"}
        assert not any(path.is_dir() for path in out.iterdir())
        loaded = fqcompile.load(None, out)
        with torch.no_grad():
            errors[method] = float((loaded(tokens).logits - exact(tokens).logits).square().mean())
    assert errors["gptq"] < errors["scale"], errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gptq"}, ("method", "'gptq'", "calibration", "text file")),
        ({"calibration": "no such.txt"}, ("calibration", "'no such.txt'", "text file")),
        ({"calibration": "synthetic", "method": "gptq"}, ("method", "'synthetic'", "batches")),
        ({"method": "gtpq"}, ("method", "'gtpq'", "did you mean 'gptq'")),
        ({"calibration": "empty.txt"}, ("calibration", "'empty.txt'", "no text", "thousand")),
        ({"calibration": "latin.txt"}, ("calibration", "'latin.txt'", "UTF-8")),
    ],
)
def test_data_that_is_none_is_refused(
    source: Path,
    tmp_path: Path,
    options: dict[str, Any],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(OptionError) as caught:
        fqcompile.quantize_checkpoint(source, tmp_path / "out", **options)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_text_needs_a_tokenizer(source: Path, text: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(OptionError, match=r"has no tokenizer .* copy .* batches") as caught:
        fqcompile.quantize_checkpoint(tmp_path, tmp_path / "out", calibration=text)
    assert str(tmp_path) in str(caught.value)


def test_sequences_are_no_longer_than_the_model_s(source: Path, text: Path, tmp_path: Path) -> None:
    """A model with a table of positions has no others."""
    torch.manual_seed(0)
    config = hf.OPTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, ffn_dim=96, vocab_size=128,
        word_embed_proj_dim=64, max_position_embeddings=100,
    )  # fmt: skip
    frozen(hf.OPTForCausalLM(config)).save_pretrained(tmp_path)
    for file in source.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plan = fqcompile.quantize_checkpoint(tmp_path, tmp_path / "out", calibration=text, **OPTIONS)
    rows = {site.calibration_rows for site in plan.quantized if site.bits == 4}
    assert rows == {(5 * 512 + 100) // 100 * 100}


@pytest.mark.parametrize(
    ("tokens", "bits", "lines"),
    [
        (600, 4, ["gptq: 14 of 15 weights", "rounded 1: 8 bits have small errors anyway"]),
        (600, 8, ["gptq: 0 of 15 weights", "rounded 15: 8 bits have small errors anyway"]),
        (
            90,
            4,
            [
                "gptq: 0 of 15 weights",
                "rounded 14: it needs 512 rows of inputs, and there were 90",
                "rounded 1: 8 bits have small errors anyway",
            ],
        ),
    ],
)
def test_the_command_says_what_gptq_did(
    source: Path,
    ids: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tokens: int,
    bits: int,
    lines: list[str],
) -> None:
    """Also `quantize_`, in the same words."""
    (tmp_path / "text.txt").write_text(" ".join(f"w{n}" for n in ids[:tokens].tolist()))
    given = ["--method", "gptq", "--calibration", str(tmp_path / "text.txt")]
    options = ["--min-elements", "2048", "--granularity", "32"]
    if bits == 8:
        options += ["--bits", "8"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *given, *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    at = printed.index(lines[0])
    assert printed[at : at + len(lines)] == lines
    model = hf.LlamaForCausalLM.from_pretrained(source)
    own: dict[str, Any] = {**OPTIONS, **({"bits": 8} if bits == 8 else {})}
    batches = [ids[: min(tokens, 512)][None]]
    assert fqcompile.quantize_(model, calibration=batches, method="gptq", **own).notes()[1:] == (
        lines
    )
