"""Sentence embeddings of a real model, quantised each way: cosines to those of the fp32 model."""

import torch

from bench.accuracy.others import Baseline
from bench.accuracy.quantized import Quantised, ours, theirs
from bench.accuracy.rows import WAYS
from bench.core.results import Row
from fqcompile.commands.demo_embedding import Embedder, Sentences, load_embedder, nearest

__all__ = ["embedding_rows", "load_embedder"]


@torch.no_grad()
def embedding_rows(
    embedder: Embedder, sentences: Sentences, ways: list[str], baselines: list[Baseline]
) -> list[Row]:
    """One row per way and library: bits, error of the matrices, cosines, the same neighbours."""
    exact = embedder(sentences)
    transformer = embedder.transformer
    made = {way: ours(transformer, WAYS[way]) for way in ways}
    made |= {b.name: theirs(transformer, b.quantiser) for b in baselines}
    return [_row(way, quantised, exact, sentences) for way, quantised in made.items()]


def _row(way: str, quantised: Quantised, exact: torch.Tensor, sentences: Sentences) -> Row:
    embeddings = Embedder(quantised.model).eval()(sentences)
    cosine = (exact * embeddings).sum(-1)
    return {
        "way": way,
        "bits_per_weight": quantised.bits_per_weight,
        "mean_error": quantised.mean_error,
        "cosine": cosine.mean().item(),
        "least_cosine": cosine.min().item(),
        "same_neighbour": (nearest(exact) == nearest(embeddings)).double().mean().item(),
    }
