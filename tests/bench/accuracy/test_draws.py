"""`bench draws`: orders that change nothing else, true bits, rows that are kept, Gemma's texts."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the bench extra is not installed")

import fqcompile
from bench.accuracy import draws
from bench.accuracy.corpus import Document
from bench.accuracy.draws import draw_rows, drawn, order_of
from bench.accuracy.draws_section import draws as section
from bench.accuracy.gemma import docstrings, narrowed, texts
from bench.accuracy.language_model import IGNORED, Windows, windows_of
from bench.accuracy.packaged import PACKAGED, masked
from bench.accuracy.subjects import (
    Moment,
    Subject,
    divergence_of,
    error_weights,
    second_moments,
)
from bench.accuracy.train_lm import SIZES, build, train_tokenizer
from bench.accuracy.ways import BASE, exported, gptq_way, our_way, their_way
from fqcompile.weights.parameter import PackedWeight
from tests.bench.made_up_results import cells, content

TINY = SIZES["tiny"]
TEXT = "def value(self, name):\n    return self.table[name]\n" * 60
DOCUMENTS = tuple(Document(f"{n}.py", TEXT[n * 7 :]) for n in range(4))


def subject_of(family: str) -> Subject:
    """Untrained, on made-up text."""
    tokenizer = train_tokenizer(DOCUMENTS, TINY.vocabulary)
    windows = windows_of(DOCUMENTS, tokenizer, TINY.context, 1)
    model = build(family, TINY).eval().requires_grad_(False)
    return Subject.of(family, model, divergence_of(model, windows), windows.tokens)


@pytest.fixture(scope="module")
def llama() -> Subject:
    return subject_of("llama")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_each_draw_has_the_columns_in_its_order_and_they_are_put_back(family: str) -> None:
    subject = subject_of(family)
    before = {name: w.matrix.clone() for name, w in subject.weights.items()}
    left: list[dict[str, Tensor]] = []
    seen: list[Tensor] = []

    def without_the_first_channel(name: str, w: Tensor, order: Tensor) -> tuple[Tensor, float]:
        seen.append(order)
        assert torch.equal(w, before[name][..., order])
        return w * (order != 0), 4.0

    def divergence() -> Tensor:
        left.append({name: w.matrix.clone() for name, w in subject.weights.items()})
        return torch.zeros(4, dtype=torch.float64)

    changed = Subject(**{**vars(subject), "divergence": divergence})
    found, bits = drawn(changed, without_the_first_channel, draws=3)
    assert found.shape == (3, 4) and bits == 4.0
    for own in left:
        for name, matrix in own.items():
            assert torch.equal(matrix[..., 1:], before[name][..., 1:])
            assert not matrix[..., 0].any()
    assert torch.equal(seen[0], torch.arange(len(seen[0])))
    assert not torch.equal(seen[len(before)], seen[2 * len(before)])
    assert all(torch.equal(subject.weights[name].matrix, w) for name, w in before.items())


def test_the_exact_weights_have_no_divergence_and_eight_bits_little(llama: Subject) -> None:
    exact, _ = drawn(llama, lambda name, w, order: (w, 32.0), draws=2)
    assert float(exact.abs().max()) < 1e-12
    eight, bits = drawn(llama, our_way({"bits": 8, "granularity": 32}), draws=1)
    four, _ = drawn(llama, our_way({"granularity": 32}), draws=1)
    assert bits == 8.5
    assert 0 < float(eight.mean()) < float(four.mean()) / 50


def test_the_weights_of_errors_are_of_the_inputs_in_the_order_of_the_draw(llama: Subject) -> None:
    name, weight = next((n, w) for n, w in llama.weights.items() if n.endswith("o_proj.weight"))
    inputs: list[Tensor] = []
    hook = llama.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0])
    )
    with torch.no_grad():
        llama.model(llama.text[0])
    hook.remove()
    square = inputs[0].flatten(0, -2).double().square().mean(0)
    found = error_weights(llama, llama.text[:1])[name]
    torch.testing.assert_close(
        found, ((square / square.mean() + 1) / 2).float(), rtol=2**-8, atol=0
    )

    h = {name: torch.arange(1.0, 1 + weight.matrix.shape[-1])}
    order = order_of(weight.matrix.shape[-1], draw=1)
    w = weight.matrix[:, order].contiguous()
    weighted, _ = our_way({"granularity": 64}, lambda: h)(name, w, order)
    plain, _ = our_way({"granularity": 64})(name, w, order)
    losses = [((w_hat - w).square() * h[name][order]).sum() for w_hat in (weighted, plain)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_error_feedback_keeps_the_outputs_on_its_text(family: str) -> None:
    subject = subject_of(family)
    h, moments = error_weights(subject, subject.text), second_moments(subject, subject.text)
    rows = {name: [max(one.rows, 512) for one in own] for name, own in moments.items()}
    many = {n: [Moment(m.sum, r) for m, r in zip(moments[n], rows[n], strict=True)] for n in rows}
    options = {"granularity": 64, "levels": "uniform"}
    for name, weight in subject.weights.items():
        order = order_of(weight.matrix.shape[-1], draw=1)
        w = weight.matrix[..., order].contiguous()
        ways = gptq_way(options, lambda: h, lambda: many), our_way(options, lambda: h)
        kept = [way(name, w, order)[0].view(w.shape) for way in ways]
        sums = torch.stack([m.sum[order][:, order] for m in moments[name]])
        errors = [((w_hat - w).view(len(sums), -1, w.shape[-1])) for w_hat in kept]
        losses = [(e @ sums * e).sum().item() for e in errors]
        assert losses[0] < losses[1], name


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_an_exported_model_has_the_values_that_were_chosen(method: str, llama: Subject) -> None:
    pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")
    text = [torch.cat(llama.text)] * 2  # GPTQ takes 512 tokens
    options = {"bits": 4, "granularity": 64, "calibration": text, "method": method}
    own = copy.deepcopy(llama.model)
    exclude = ["lm_head"]
    plan = fqcompile.quantize_(own, levels="uniform", exclude=exclude, **options)
    assert {site.name for site in plan.quantized} == llama.weights.keys()
    loaded = exported(llama.model, options)
    for name in llama.weights:
        packed = own.get_parameter(name)
        assert isinstance(packed, PackedWeight)
        assert torch.equal(loaded.get_parameter(name), packed.dequantized()), name


def test_a_library_rounds_each_expert_alone_and_its_bits_are_the_mean() -> None:
    subject = subject_of("mixtral")
    shapes: list[torch.Size] = []

    def quantizer(matrix: Tensor) -> tuple[Tensor, float]:
        shapes.append(matrix.shape)
        return matrix.round(), float(len(shapes))

    name, weight = next((n, w) for n, w in subject.weights.items() if w.matrix.dim() == 3)
    w = weight.matrix
    w_hat, bits = their_way(quantizer)(name, w, torch.arange(w.shape[-1]))
    assert torch.equal(w_hat, w.round()) and shapes == [w.shape[1:]] * len(w)
    assert bits == (len(w) + 1) / 2


def test_rows_are_paired_with_the_first_and_known_ones_are_kept(llama: Subject) -> None:
    ways = {BASE: our_way({"granularity": 64, "levels": "uniform"}),
            "twice": our_way({"granularity": 32, "levels": "uniform"})}  # fmt: skip
    rows = list(draw_rows(llama, ways, draws=2))
    base, other = rows
    assert base["ratio"] == base["ratio_low"] == base["ratio_high"] == 1
    assert other["ratio"] == pytest.approx(other["divergence"] / base["divergence"])
    assert other["ratio_low"] <= other["ratio"] <= other["ratio_high"] < 1
    assert (base["bits_per_weight"], other["bits_per_weight"]) == (4.25, 4.5)
    again = list(draw_rows(llama, ways, draws=2, known=rows[:1]))
    assert again == [other]


def test_the_command_keeps_what_its_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(draws, "subject_of", lambda name, size: subject_of(name))
    monkeypatch.setattr(draws, "gemma_missing", lambda: "no such package")
    asked = ["--model", "gemma", "opt", "--way", "normal g64$", "--draws", "1", "--json", str(file)]
    draws.main(asked)
    content = json.loads(file.read_text())
    assert [row["way"] for row in content["rows"]] == [BASE, "int4 normal g64"]
    assert "gemma: no such package" in content["left_out"]
    content["rows"][0]["divergence"] = 7.0
    file.write_text(json.dumps(content))
    draws.main([*asked, "--way", "int8"])
    rows = json.loads(file.read_text())["rows"]
    assert [row["way"] for row in rows] == [BASE, "int4 normal g64", "int8 g128"]
    assert rows[0]["divergence"] == 7.0


def test_the_section_has_a_line_for_each_way() -> None:
    def row(model: str, way: str, ratio: float, bits: float) -> dict[str, object]:
        ends = {"ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1}
        about = {"model": model, "way": way, "ratio": ratio, "bits_per_weight": bits}
        draws = [0.5 * ratio] * (1 if way == "b" else 2)
        return about | ends | {"divergence": 0.5 * ratio, "spread": 0.01, "draws": draws}

    rows = [
        row("gemma", BASE, 1.0, 4.25),
        row("gemma", "b", 0.5, 4.1),
        row("MiniLM", "b", 0.8, 4.2),
    ]
    text = section(content(rows))
    assert cells(text, BASE) == [BASE, "4.25", "1.000 [0.900, 1.100]", "0.5000 (0.0100)", "", ""]
    second = ["b", "4.10 to 4.20", "0.500 [0.400, 0.600]", "0.2500 (one)"]
    assert cells(text, "b")[:4] == second


def test_prose_is_of_documentation_strings_and_code_of_other_files() -> None:
    source = '"""A module."""\ndef f():\n    "What f does."\n' + "x = 1\n" * 3000
    assert docstrings(source) == "A module.\n\nWhat f does."
    assert docstrings("print 'no Python of today'") == ""
    long = f'"""{"Words of prose. " * 400}"""\n'
    corpus = [Document("a.py", source), Document("b.py", long), Document("c.txt", long * 9),
              Document("d.py", source), Document("e.py", long)]  # fmt: skip
    prose, code = texts(corpus, 1)
    assert (prose.name, code.name) == ("b.py", "a.py")
    assert prose.text.startswith("Words of prose.") and "x = 1" in code.text[:9]


class Decoder(nn.Module):
    """As transformers has them: a body that returns states, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(8, 50, bias=False)
        self.config = SimpleNamespace(vocab_size=50)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


@torch.no_grad()
def test_the_tokens_that_are_kept_are_the_likeliest_and_those_of_the_texts() -> None:
    torch.manual_seed(0)
    model = Decoder()
    tokens = torch.tensor([[2, 5, 7], [2, 9, 2]])
    targets = torch.tensor([[5, 7, 49], [9, IGNORED, IGNORED]])
    windows = Windows(tokens, targets, torch.tensor([0, 1]), torch.tensor([3, 1]))
    narrow, own = narrowed(model, windows, size=6)
    whole = model.lm_head(model.model.table(tokens))
    by_mass = whole.softmax(-1).sum((0, 1)).argsort(descending=True).tolist()
    asked = [5, 7, 9, 49]
    kept = sorted(asked + [token for token in by_mass if token not in asked][:2])
    torch.testing.assert_close(narrow(tokens).logits, whole[..., kept])
    assert [kept[t] for t in own.targets[own.targets != IGNORED].tolist()] == [5, 7, 49, 9]
    assert own.targets[1, 1:].tolist() == [IGNORED, IGNORED]


def test_windows_begin_with_the_token_that_is_asked_for() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, TINY.vocabulary)
    windows = windows_of([Document("a", "return")], tokenizer, TINY.context, 1, begin=3)
    asked = windows.targets[0] != IGNORED
    assert windows.tokens[0, 0] == 3 and bool((windows.tokens[0][~asked] == 3).all())


def test_an_encoder_is_asked_for_what_is_masked() -> None:
    found = PACKAGED["AntiBERTy"]
    sequences = torch.arange(5, 25).repeat(3, 5)
    sequences[:, 0], sequences[:, -1] = found.begin, found.end
    windows = masked(sequences, found)
    chosen = windows.tokens == found.mask
    assert windows.document.unique(return_counts=True)[1].tolist() == [4, 4, 4]
    whole = sequences[windows.document]
    assert torch.equal(windows.tokens, torch.where(chosen, found.mask, whole))
    assert torch.equal(windows.targets, torch.where(chosen, whole, IGNORED))
    assert 0.1 < chosen.double().mean() < 0.2 and not chosen[:, [0, -1]].any()
    assert not torch.equal(chosen[0], chosen[1])


def test_the_section_pairs_what_is_calibrated_with_the_same_draws_without() -> None:
    about = {"bits_per_weight": 4.25, "divergence": 1.0, "spread": 0.1}
    ends = {"ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}
    draws = {"int4 normal g64": [1.0, 2.0], "int4 normal g64, synthetic": [0.5, 1.4]}
    rows = [{"model": "a", "way": way, "draws": own, **about, **ends} for way, own in draws.items()]
    assert cells(section(content(rows)), "a") == ["a", "0.600 (0.100)"]
