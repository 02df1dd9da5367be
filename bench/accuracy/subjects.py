"""Models whose weights are replaced in place, what that changes, and what their inputs are like.

A language model's divergence is that of its next-token distributions from the exact model's, in
nats, the mean over the tokens of a document; of sentence embeddings it is 1 - cosine.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.accuracy.corpus import Document, stdlib_corpus
from bench.accuracy.gemma import gemma_windows, load_gemma, narrowed, texts
from bench.accuracy.language_model import IGNORED, Windows, evaluate, windows_of
from bench.accuracy.quantized import NO_HEAD
from bench.accuracy.train_lm import SIZES, trained
from fqcompile.config import FineQuantConfig
from fqcompile.demo.embedding import load_embedder
from fqcompile.modules.calibrate import collect_inputs
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.quant.calibration import Moments, token_generator, token_ids

_SYNTHETIC = 32, 16  # sequences and tokens of each, as a compile has them
_DOCUMENTS, _CALIBRATING = 6, 16  # Gemma's, of each kind: prose and code
_FILES = 24  # of the small models


@dataclass(frozen=True)
class Subject:
    """A model, by the weights that every way quantizes.

    Attributes:
        weights: by name.
        divergence: of the model as it is from the exact one, [D] by document, float64.
        synthetic, text: batches that its weights' inputs are taken from.
    """

    name: str
    model: nn.Module
    weights: Mapping[str, ModuleWeight]
    divergence: Callable[[], Tensor]
    synthetic: list[Tensor]
    text: list[Tensor]


@dataclass
class Moment:
    """Xᵀ X [K, K] of the rows seen, and their number."""

    sum: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.rows += len(rows)


def _subject(
    name: str, model: nn.Module, divergence: Callable[[], Tensor], vocabulary: int, text: Tensor
) -> Subject:
    found = module_weights(model, FineQuantConfig.from_options(NO_HEAD))
    weights = {w.name: w for w in found if w.reason is None}
    ids = token_ids(_SYNTHETIC, vocabulary, token_generator())
    return Subject(name, model, weights, divergence, [ids], list(text.split(4)))


def divergence_of(model: nn.Module, windows: Windows) -> Callable[[], Tensor]:
    """Of the language model as it will be from the one it is now."""
    exact = evaluate(model, windows)
    asked = (windows.targets != IGNORED).sum(1)
    tokens = torch.bincount(windows.document, asked.double())
    return lambda: evaluate(model, windows, exact).divergence * math.log(2) / tokens


def gemma_subject(documents: int = _DOCUMENTS) -> Subject:
    """Gemma 3 270M on documentation strings and code of files that are held out."""
    corpus = stdlib_corpus()
    model, tokenizer = load_gemma()
    windows = gemma_windows(tokenizer, texts(corpus.held_out, documents))
    narrow, windows = narrowed(model, windows)
    text = gemma_windows(tokenizer, texts(corpus.train, _CALIBRATING)).tokens
    vocabulary = narrow.model.config.vocab_size
    return _subject("gemma", narrow, divergence_of(narrow, windows), vocabulary, text)


def trained_subject(family: str, size: str) -> Subject:
    """One of the small models, on the start of files that are held out."""
    corpus, own = stdlib_corpus(), trained(family, size)

    def windows(documents: Sequence[Document]) -> Windows:
        return windows_of(documents, own.tokenizer, SIZES[size].context, 1)

    held_out, text = windows(corpus.held_out[:_FILES]), windows(corpus.train[:_FILES]).tokens
    vocabulary = own.tokenizer.get_vocab_size()
    return _subject(family, own.model, divergence_of(own.model, held_out), vocabulary, text)


def minilm_subject() -> Subject:
    """MiniLM on the sentences of the demo; of text, the other half of them."""
    embedder, sentences = load_embedder()
    half = len(sentences.input_ids) // 2
    ids, mask = sentences.input_ids, sentences.attention_mask
    held_out = type(sentences)(ids[:half], mask[:half])
    exact = embedder(held_out)

    def divergence() -> Tensor:
        return (1 - (exact * embedder(held_out)).sum(-1)).double()

    vocabulary = embedder.transformer.config.vocab_size
    return _subject("MiniLM", embedder.transformer, divergence, vocabulary, ids[half:])


def error_weights(subject: Subject, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """h of each weight, float32 [K] or [E, K], from the inputs of its matmuls in these batches."""
    moments = {name: Moments(k, experts or 1) for name, (experts, k) in _sizes(subject).items()}
    _collect(subject, batches, lambda name, expert, x: moments[name].add(x, expert))
    found = {}
    for name, own in moments.items():
        h = own.h()
        assert h is not None, f"no input of {name} was seen"
        found[name] = h if _sizes(subject)[name][0] else h[0]
    return found


def second_moments(subject: Subject, batches: Iterable[Tensor]) -> dict[str, list[Moment]]:
    """Xᵀ X of each matrix, of each expert of a stack, and the rows of X."""
    found = {
        name: [Moment(torch.zeros(k, k)) for _ in range(experts or 1)]
        for name, (experts, k) in _sizes(subject).items()
    }
    _collect(subject, batches, lambda name, expert, x: found[name][expert].add(x))
    return found


def _sizes(subject: Subject) -> dict[str, tuple[int, int]]:
    """Experts, 0 of a matrix, and K."""
    shapes = {name: w.matrix.shape for name, w in subject.weights.items()}
    return {name: (s[0] if len(s) == 3 else 0, s[-1]) for name, s in shapes.items()}


def _collect(
    subject: Subject, batches: Iterable[Tensor], add: Callable[[str, int, Tensor], None]
) -> None:
    weights = subject.weights.values()
    collect_inputs(subject.model, batches, weights, lambda w, expert, x: add(w.name, expert, x))
