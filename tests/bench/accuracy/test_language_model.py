"""Bits per byte, agreement and intervals, against arithmetic written out anew."""

import math
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("tokenizers", reason="the bench extra is not installed")

from bench.accuracy.corpus import Document, split
from bench.accuracy.language_model import IGNORED, Evaluation, evaluate, windows_of
from bench.accuracy.rows import compare, interval
from bench.accuracy.train_lm import learning_rate, train_tokenizer
from tests.tiers import examples

CONTEXT, VOCABULARY = 9, 270
TEXTS = ["def f(x):\n    return x\n" * 4, "naïve café — ok\n" * 3, "x"]


class Bigram(nn.Module):
    """The next token depends on the last alone, so that a test can walk over plain lists."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[tokens])


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [Document(f"{number}.py", text) for number, text in enumerate(TEXTS)]


def nats(model: Bigram, last: int, token: int) -> float:
    row = rows(model)[last]
    return math.log(sum(math.exp(value) for value in row)) - row[token]


@lru_cache
def rows(model: Bigram) -> list[list[float]]:
    return cast(list[list[float]], model.table.tolist())


@pytest.mark.parametrize("most", [1, 2, 100])
def test_bits_are_those_of_every_token_once(documents: Sequence[Document], most: int) -> None:
    tokenizer = train_tokenizer(documents, VOCABULARY)
    model = Bigram()
    found = evaluate(model, windows_of(documents, tokenizer, CONTEXT, most))
    for number, document in enumerate(documents):
        ids = tokenizer.encode(document.text).ids[: most * (CONTEXT - 1)]
        expected = 0.0
        for place, token in enumerate(ids):
            last = ids[place - 1] if place % (CONTEXT - 1) else 0
            expected += nats(model, last, token) / math.log(2)
        assert found.bits[number].item() == pytest.approx(expected, rel=1e-5)
    if most == 100:
        assert found.bytes.tolist() == [len(text.encode()) for text in TEXTS]
        whole = found.bits.sum().item() / sum(len(text.encode()) for text in TEXTS)
        assert found.bits_per_byte == pytest.approx(whole)


def test_agreement_counts_equal_tokens_and_no_filling(documents: Sequence[Document]) -> None:
    tokenizer = train_tokenizer(documents, VOCABULARY)
    windows = windows_of(documents, tokenizer, CONTEXT, 100)
    one, other = Bigram(), Bigram()
    first = evaluate(one, windows)
    count = int((windows.targets != IGNORED).sum())
    assert first.likeliest.shape == (count,)
    with torch.no_grad():  # other's answer after "x" alone is another one
        changed = int(windows.tokens[0, 3])
        other.table[changed, (int(one.table[changed].argmax()) + 1) % VOCABULARY] = 99.0
    last = [
        int(token)
        for row, target in zip(windows.tokens, windows.targets, strict=True)
        for token, wanted in zip(row, target, strict=True)
        if wanted != IGNORED
    ]
    expected = 1 - last.count(changed) / count
    assert evaluate(other, windows).agreement(first) == pytest.approx(expected)
    assert 0 < expected < 1


def test_divergence_is_the_sum_over_all_tokens_that_might_come(
    documents: Sequence[Document],
) -> None:
    tokenizer = train_tokenizer(documents, VOCABULARY)
    windows = windows_of(documents, tokenizer, CONTEXT, 100)
    one, other = Bigram(0), Bigram(1)
    exact = evaluate(one, windows)
    assert evaluate(one, windows, exact).divergence.abs().max() < 1e-4
    found = evaluate(other, windows, exact).divergence
    for number, document in enumerate(documents):
        ids = tokenizer.encode(document.text).ids
        expected = 0.0
        for place in range(len(ids)):
            last = ids[place - 1] if place % (CONTEXT - 1) else 0
            for token in range(VOCABULARY):
                p, q = (math.exp(-nats(model, last, token)) for model in (one, other))
                expected += p * math.log2(p / q)
        assert found[number].item() == pytest.approx(expected, rel=1e-4)


def test_the_row_of_a_comparison_is_its_arithmetic() -> None:
    lengths = torch.tensor([10, 30])
    nothing, apart = torch.tensor([[0.0, 0.0], [1.0, 5.0]]).double()
    bits, more = torch.tensor([[20.0, 60.0], [24.0, 60.0]]).double()
    exact = Evaluation(bits, lengths, torch.tensor([1, 2, 3, 4]), nothing)
    other = Evaluation(more, lengths, torch.tensor([1, 2, 3, 5]), apart)
    row = compare(exact, other)
    assert row["bits_per_byte"] == pytest.approx(84 / 40)
    assert row["loss"] == pytest.approx(4 / 40)
    assert row["divergence"] == pytest.approx(6 / 40)
    assert row["agreement"] == 0.75
    assert 0 <= row["loss_low"] <= row["loss"] <= row["loss_high"] <= 0.4


@settings(max_examples=examples(30), deadline=None)
@given(
    loss=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    length=st.integers(1, 1000),
)
def test_an_interval_lies_among_the_documents_own_ratios(loss: list[float], length: int) -> None:
    losses = torch.tensor(loss, dtype=torch.float64)
    low, high = interval(losses, torch.full_like(losses, length))
    slack = 1e-9
    assert min(loss) / length - slack <= low <= high <= max(loss) / length + slack


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for _ in range(60):
        losses = torch.randn(40, generator=generator, dtype=torch.float64) + 2
        low, high = interval(losses, torch.ones_like(losses))
        hits += low <= 2 <= high
    assert 50 <= hits <= 60


def test_files_are_held_out_by_name_alone() -> None:
    names = [f"folder/module{number}.py" for number in range(600)]
    one = split([Document(name, "a" * 10) for name in names])
    other = split([Document(name, "b" * 99) for name in reversed(names)])
    assert [d.name for d in one.held_out] == [d.name for d in other.held_out]
    held, trained = {d.name for d in one.held_out}, {d.name for d in one.train}
    assert held | trained == set(names) and not held & trained
    assert 25 <= len(held) <= 80
    assert one.digest != other.digest


def test_the_learning_rate_rises_and_falls_within_its_peak() -> None:
    rates = [learning_rate(step, 500) for step in range(500)]
    peak = rates.index(max(rates))
    assert max(rates) == 1 and 20 <= peak <= 40
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.05 <= rates[-1] < 0.06
