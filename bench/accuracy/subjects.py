"""Models whose weights are replaced in place, what that changes, and what their inputs are like.

A language model's divergence is that of its next-token distributions from the exact model's, in
nats, the mean over the tokens of a document; of sentence embeddings it is 1 - cosine.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.accuracy.corpus import Document, german_text, stdlib_corpus
from bench.accuracy.gemma import dithered_gemma, gemma_windows, narrowed, texts
from bench.accuracy.language_model import IGNORED, Windows, evaluate, windows_of
from bench.accuracy.quantized import NO_HEAD
from bench.accuracy.train_lm import SIZES, trained
from fqcompile.config import FineQuantConfig
from fqcompile.demo.embedding import load_embedder
from fqcompile.modules.calibrate import calibrated, collect_inputs
from fqcompile.modules.weights import ModuleWeight, module_weights

_DOCUMENTS, _CALIBRATING = 6, 16  # Gemma's, of each kind: prose and code
_FILES = 24  # of the small models


@dataclass(frozen=True)
class Subject:
    """A model, by the weights that every way quantizes.

    Attributes:
        weights: by name.
        divergence: of the model as it is from the exact one, [D] by document, float64.
        text: batches of what it was made for, other than those of the divergence.
        german: as many tokens of another language than the text's, where there are some.
    """

    name: str
    model: nn.Module
    weights: Mapping[str, ModuleWeight]
    divergence: Callable[[], Tensor]
    text: list[Tensor]
    german: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls, name: str, model: nn.Module, divergence: Callable[[], Tensor], text: Tensor
    ) -> "Subject":
        """Of the matrices that `quantize_` would pack, but output heads; text in batches of 4."""
        found = module_weights(model, FineQuantConfig.from_options(NO_HEAD))
        weights = {w.name: w for w in found if w.reason is None and not w.head}
        return cls(name, model, weights, divergence, list(text.split(4)))


@dataclass
class Moment:
    """Xᵀ X [K, K] of the rows seen, and their number."""

    sum: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.rows += len(rows)


def divergence_of(model: nn.Module, windows: Windows) -> Callable[[], Tensor]:
    """Of the language model as it will be from the one it is now."""
    exact = evaluate(model, windows)
    asked = (windows.targets != IGNORED).sum(1)
    tokens = torch.bincount(windows.document, asked.double())
    return lambda: evaluate(model, windows, exact).divergence * math.log(2) / tokens


def gemma_subject(documents: int = _DOCUMENTS) -> Subject:
    """Gemma 3 270M on documentation strings and code of files that are held out."""
    corpus = stdlib_corpus()
    model, tokenizer = dithered_gemma()
    windows = gemma_windows(tokenizer, texts(corpus.held_out, documents))
    narrow, windows = narrowed(model, windows)
    text = gemma_windows(tokenizer, texts(corpus.train, _CALIBRATING)).tokens
    found = Subject.of("gemma", narrow, divergence_of(narrow, windows), text)
    german = gemma_windows(tokenizer, [Document("de", german_text())], most=len(text)).tokens
    return replace(found, german=list(german.split(4)))


def trained_subject(family: str, size: str) -> Subject:
    """One of the small models, on the start of files that are held out."""
    corpus, own = stdlib_corpus(), trained(family, size)

    def windows(documents: Sequence[Document]) -> Windows:
        return windows_of(documents, own.tokenizer, SIZES[size].context, 1)

    held_out, text = windows(corpus.held_out[:_FILES]), windows(corpus.train[:_FILES]).tokens
    return Subject.of(family, own.model, divergence_of(own.model, held_out), text)


def minilm_subject() -> Subject:
    """MiniLM on the sentences of the demo; of text, the other half of them."""
    embedder, sentences = load_embedder()
    half = len(sentences.input_ids) // 2
    ids, mask = sentences.input_ids, sentences.attention_mask
    held_out = type(sentences)(ids[:half], mask[:half])
    exact = embedder(held_out)

    def divergence() -> Tensor:
        return (1 - (exact * embedder(held_out)).sum(-1)).double()

    return Subject.of("MiniLM", embedder.transformer, divergence, ids[half:])


def error_weights(subject: Subject, calibration: Any) -> dict[str, Tensor]:
    """h of each weight, float32 [K] or [E, K], as `quantize_(calibration=)` finds it."""
    found = calibrated(subject.model, subject.weights.values(), calibration)
    unseen = [f"{name}: {one.source}" for name, one in found.items() if one.h is None]
    assert not unseen, unseen
    return {name: one.h for name, one in found.items() if one.h is not None}


def second_moments(subject: Subject, batches: Iterable[Tensor]) -> dict[str, list[Moment]]:
    """Xᵀ X of each matrix, of each expert of a stack, and the rows of X."""
    shapes = {name: weight.matrix.shape for name, weight in subject.weights.items()}
    found = {
        name: [Moment(torch.zeros(shape[-1], shape[-1])) for _ in range(math.prod(shape[:-2]))]
        for name, shape in shapes.items()
    }
    collect_inputs(
        subject.model,
        batches,
        subject.weights.values(),
        lambda weight, expert, x: found[weight.name][expert].add(x),
    )
    return found
