"""Models whose weights are replaced in place, what that changes, and what their inputs are like.

A language model's divergence is that of its next-token distributions from the exact model's, in
nats, the mean over the tokens of a document; of sentence embeddings it is 1 - cosine.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.accuracy.corpus import stdlib_corpus
from bench.accuracy.gemma import gemma_windows, load_gemma, narrowed, texts
from bench.accuracy.language_model import IGNORED, Trained, Windows, evaluate, windows_of
from bench.accuracy.quantized import NO_HEAD
from fqcompile.config import FineQuantConfig
from fqcompile.demo.embedding import load_embedder
from fqcompile.modules.calibrate import collect_inputs
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.quant.calibration import Moments, token_generator, token_ids

_SYNTHETIC = 32, 16  # sequences and tokens of each, as a compile has them
_DOCUMENTS, _CALIBRATING = 6, 16  # files of each kind, prose and code


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
    vocabulary = narrow.decoder.config.vocab_size
    return _subject("gemma", narrow, divergence_of(narrow, windows), vocabulary, text)


def trained_subject(family: str, trained: Trained, windows: Windows, context: int) -> Subject:
    """One of the small models, on the windows that its other rows are measured on."""
    text = windows_of(stdlib_corpus().train[: 2 * _CALIBRATING], trained.tokenizer, context, 1)
    model, vocabulary = trained.model, trained.tokenizer.get_vocab_size()
    return _subject(family, model, divergence_of(model, windows), vocabulary, text.tokens)


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
    moments = {
        name: Moments(w.matrix.shape[-1], len(w.matrix) if w.matrix.dim() == 3 else 1)
        for name, w in subject.weights.items()
    }
    collect_inputs(
        subject.model,
        batches,
        subject.weights.values(),
        lambda weight, expert, x: moments[weight.name].add(x, expert),
    )
    found = {}
    for name, own in moments.items():
        h = own.h()
        assert h is not None, f"no input of {name} was seen"
        found[name] = h.view(*subject.weights[name].matrix.shape[:-2], -1)
    return found
