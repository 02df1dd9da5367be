"""Files that llama.cpp reads hold our models' weights, and its way of `bench models`."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the bench extra is not installed")
pytest.importorskip("gguf", reason="the bench extra is not installed")

import gguf

from bench.core import measure
from bench.core.measure import allowed_error, relative_error
from bench.core.shapes import build
from bench.models import gguf_file, llama_cpp
from bench.models import run as models
from bench.models.gguf_file import Types, read_into, write
from bench.models.phases import Decoding, Generation, random_tokens
from bench.models.section import models as section
from fqcompile.errors import OptionError

EXACT = Types("F32", "F32")


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(name, 2, dtype, "cpu")


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_a_file_holds_the_weights_within_the_steps_of_its_blocks(name: str, tmp_path: Path) -> None:
    """Q4_0: of 32 weights the largest is the end of 16 levels, an eighth of it apart; the other end
    is one level short. Q8_0: 127ths. Scales are fp16."""
    model, rounded = made(name), made(name)
    write(model, tmp_path / "m.gguf")
    read_into(rounded, tmp_path / "m.gguf")
    for key, value in model.named_parameters():
        w, w_hat = value.detach(), rounded.get_parameter(key).detach()
        if w.dim() == 1 or key.endswith("mlp.gate.weight"):
            assert torch.equal(w, w_hat), key
            continue
        table = "embed_tokens" in key or "lm_head" in key
        largest = w.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        step = largest * (0.5 / 127 if table else 1 / 8) * (1 + 2**-10) + largest * 2**-10
        assert ((w - w_hat).unflatten(-1, (-1, 32)).abs() <= step).all(), key
        assert not torch.equal(w, w_hat)


def test_rows_of_q_and_k_are_in_the_order_of_pairs(tmp_path: Path) -> None:
    model = made("tiny")
    write(model, tmp_path / "m.gguf", EXACT)
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for key, stem in (("q", "attn_q"), ("k", "attn_k")):
        w = model.get_parameter(f"model.layers.1.self_attn.{key}_proj.weight").detach().numpy()
        found = held[f"blk.1.{stem}.weight"]
        for head, pair, half in ((0, 0, 1), (1, 5, 0), (1, 31, 1)):  # heads of 64
            assert (found[64 * head + 2 * pair + half] == w[64 * head + 32 * half + pair]).all()


def test_other_models_have_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="model_type='opt'"):
        write(made("tiny-opt"), tmp_path / "m.gguf")


def test_a_tied_head_is_read_and_a_table_is_not(tmp_path: Path) -> None:
    model = made("tiny-moe")
    write(model, tmp_path / "m.gguf")
    whole = gguf_file.bytes_read(tmp_path / "m.gguf", 1)
    experts = 2 * 8 * 3 * 256 * 128 * 18 // 32  # blocks of 18 bytes
    assert whole - gguf_file.bytes_read(tmp_path / "m.gguf", 0.25) == 0.75 * experts
    model.lm_head.weight = model.model.embed_tokens.weight
    write(model, tmp_path / "tied.gguf")
    assert gguf_file.bytes_read(tmp_path / "tied.gguf", 1) == whole


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_llama_cpp_computes_the_logits_of_the_model(
    name: str, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From exact weights in fp32; keys, values and what multiplies them are rounded to fp16."""
    monkeypatch.setattr(gguf_file, "write", lambda model, path: write(model, path, EXACT))
    model = made(name)
    file = llama_cpp._File(model)
    assert file.error <= allowed_error(torch.float16, 2) < file.allowed
    tokens = random_tokens(model, 6)
    with torch.no_grad():
        right = model(input_ids=tokens).logits[0, -1]
    sequence = llama_cpp._Sequence(file, 32, flash=True)
    numbers = tokens[0].int().numpy()
    sequence.read(numbers)
    sequence.rewind(3)
    found = sequence.read(numbers[3:])
    assert relative_error(found, right) <= allowed_error(torch.float16, 2)


def test_a_file_of_other_weights_is_not_timed(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_another(model: Any, path: Path) -> None:
        write(build("tiny", 2, torch.float32, "cpu"), path)
        model.lm_head.weight.data.neg_()

    monkeypatch.setattr(gguf_file, "write", write_another)
    monkeypatch.setattr(gguf_file, "read_into", lambda model, path: None)
    with pytest.raises(llama_cpp.WrongResult, match="relative error"):
        llama_cpp._File(made("tiny"))


def test_one_sequence_is_measured(library: Any) -> None:
    model = made("tiny")
    with pytest.raises(OptionError, match="batch=2"):
        llama_cpp.ready(model, Decoding(model, 2, 4, 3))


def test_generated_tokens_are_the_likeliest(library: Any) -> None:
    model = made("tiny")
    found = llama_cpp.ready(model, Generation(model, 5, 4))
    first, again = found.work().clone(), found.work()
    assert torch.equal(first, again)


def test_it_is_measured_beside_the_others(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 1)
    asked = ["--device", "cpu", "--inner", "eager", "--model", "tiny", "--layers", "1", "--batch",
             "1", "--context", "8", "--prompt", "4", "--new", "2", "--ways", "int4", "llama.cpp",
             "--phases", *models.PHASES]  # fmt: skip
    results = models.run(models.parse(asked))
    assert not any("failure" in row for row in results.rows)
    assert "CPU" in results.settings["llama_cpp"]
    ours, theirs = ([row for row in results.rows if row["way"] == w] for w in ("int4", "llama.cpp"))
    assert [row["phase"] for row in ours] == [row["phase"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["over_llama_cpp"] == pytest.approx(other["ms"] / mine["ms"])
        assert other["library"].startswith("llama_cpp 0.")
        assert isinstance(other["flash_attention"], bool)
    assert "over llama.cpp" in section(results.content)
