"""One row of the accuracy table: a model quantized one way, evaluated beside the fp32 model.

A row of ours is reported only if the dequantized model is what the compiled backend computes.
Sentence embeddings of a real model have rows too: cosines to those of the fp32 model.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.accuracy.language_model import Evaluation, Windows, evaluate
from bench.accuracy.others import Baseline
from bench.accuracy.quantized import NO_HEAD, Quantized, ours, theirs
from bench.accuracy.targets import ADAPTIVE
from bench.core.results import Row, with_version
from fqcompile.demo.embedding import Embedder, Sentences, nearest

# Of what quantization itself changes in the logits; and of the logits, for fp32's own rounding.
_ALLOWED_SHARE, _ALLOWED_ROUNDING = 0.01, 1e-5
_GATE_WINDOWS = 2
_RESAMPLES, _CONFIDENCE = 1000, 0.95

GRANULARITIES = ("column", 128, 64, 32, "range", "adaptive")
METHODS = ("mse", "absmax")
WAYS: dict[str, dict[str, Any]] = {
    f"int{bits} {f'g{g}' if isinstance(g, int) else g} {method}": {
        "bits": bits,
        "granularity": g,
        "scale_method": method,
    }
    for bits in (8, 4)
    for g in GRANULARITIES
    for method in METHODS
    if bits == 4 or g in ("column", "adaptive")
}
SENSITIVE_WAYS = "int4 column absmax", ADAPTIVE


@dataclass(frozen=True)
class Exact:
    """The fp32 model, the windows it is evaluated on, and what it makes of them."""

    model: nn.Module
    windows: Windows
    evaluation: Evaluation

    @classmethod
    def of(cls, model: nn.Module, windows: Windows) -> "Exact":
        return cls(model, windows, evaluate(model, windows))


def interval(loss: Tensor, lengths: Tensor, confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Of sum(loss) / sum(lengths) over documents [D]: the percentile bootstrap, seeded."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(loss), (_RESAMPLES, len(loss)), generator=generator)
    ratios = loss[drawn].sum(1) / lengths[drawn].sum(1)
    tail = (1 - confidence) / 2
    low, high = ratios.quantile(torch.tensor([tail, 1 - tail], dtype=ratios.dtype)).tolist()
    return low, high


def compare(exact: Evaluation, quantized: Evaluation) -> Row:
    """Bits per byte, how many more than fp32's, divergence, agreement; intervals over documents."""
    lengths = exact.bytes.double()
    difference = quantized.bits - exact.bits
    return {
        "bits_per_byte": quantized.bits_per_byte,
        **_per_byte("loss", difference, lengths),
        **_per_byte("divergence", quantized.divergence, lengths),
        "agreement": exact.agreement(quantized),
    }


def compiled_difference(
    exact: Exact, options: Mapping[str, Any], plain: nn.Module
) -> tuple[float, float]:
    """‖compiled - dequantized‖ of the logits of some windows, and how much of it is allowed."""
    tokens = exact.windows.tokens[:_GATE_WINDOWS]
    backend = {**NO_HEAD, **options, "inner_backend": "eager"}
    # Each way is a compilation of its own of the same function; of sizes that vary, so that it is
    # calibrated by as many random tokens as `quantize_` takes.
    torch._dynamo.reset()
    model = copy.deepcopy(exact.model)
    compiled = torch.compile(model, backend="finequant", options=backend, dynamic=True)
    with torch.no_grad():
        computed, dequantized, fp32 = (
            model(tokens).logits.double() for model in (compiled, plain, exact.model)
        )
    allowed = _ALLOWED_SHARE * (fp32 - dequantized).norm() + _ALLOWED_ROUNDING * fp32.norm()
    return (computed - dequantized).norm().item(), allowed.item()


@dataclass
class Evaluated:
    """A row, and the evaluation it comes from for paired comparisons."""

    row: Row
    evaluation: Evaluation | None = None


def our_row(exact: Exact, way: str) -> Evaluated:
    """Quantized by us; with "failure" in place of numbers where the backend computes otherwise."""
    options = WAYS[way]
    quantized = ours(exact.model, options)
    about = {"way": way, **options}
    difference, allowed = compiled_difference(exact, options, quantized.model)
    if not difference <= allowed:
        text = f"compiled differs from dequantized by {difference:.3g}, allowed {allowed:.3g}"
        return Evaluated({**about, "failure": text})
    about |= {"compiled_difference": difference, "allowed_difference": allowed}
    return _row(exact, about, quantized)


def row_of_type(exact: Exact, way: str, layer_type: str) -> Row:
    """The same where the matrices of one layer type alone are quantized.

    The gate has seen them: it is that of the same way on all types.
    """
    pattern = layer_type.replace(".", r"\.") + r"(\.weight)?$"
    options = {**WAYS[way], "include": [pattern]}
    return _row(exact, {"way": way, "layer_type": layer_type}, ours(exact.model, options)).row


def baseline_row(exact: Exact, baseline: Baseline) -> Evaluated:
    """Quantized and dequantized by a library."""
    about = {"way": baseline.name, "library": with_version(baseline.package)}
    return _row(exact, about, theirs(exact.model, baseline.quantizer))


def _row(exact: Exact, about: Row, quantized: Quantized) -> Evaluated:
    evaluation = evaluate(quantized.model, exact.windows, exact.evaluation)
    sizes = {
        "bits_per_weight": quantized.bits_per_weight,
        "matrices": len(quantized.weights),
        "mean_error": quantized.mean_error,
        "errors": quantized.errors_by_type(),
        "group_sizes": {w.name: w.group_size for w in quantized.weights},
    }
    return Evaluated({**about, **sizes, **compare(exact.evaluation, evaluation)}, evaluation)


def paired(reference: Evaluated, other: Evaluated) -> Row:
    """How much more `other` loses and diverges per byte than `reference`, on the same documents."""
    if reference.evaluation is None or other.evaluation is None:
        return {}
    lengths = reference.evaluation.bytes.double()
    bits = other.evaluation.bits - reference.evaluation.bits
    divergence = other.evaluation.divergence - reference.evaluation.divergence
    loss = _per_byte("loss_beyond", bits, lengths)
    return loss | _per_byte("divergence_beyond", divergence, lengths)


def _per_byte(name: str, bits: Tensor, lengths: Tensor) -> Row:
    """Of bits [D]: their sum per byte, and its interval."""
    low, high = interval(bits, lengths)
    return {name: (bits.sum() / lengths.sum()).item(), f"{name}_low": low, f"{name}_high": high}


@torch.no_grad()
def embedding_rows(
    embedder: Embedder, sentences: Sentences, ways: list[str], baselines: list[Baseline]
) -> list[Row]:
    """One row per way and library: bits, error of the matrices, cosines, the same neighbors."""
    exact = embedder(sentences)
    transformer = embedder.transformer
    made = {way: ours(transformer, WAYS[way]) for way in ways}
    made |= {b.name: theirs(transformer, b.quantizer) for b in baselines}
    return [_embedding_row(way, quantized, exact, sentences) for way, quantized in made.items()]


def _embedding_row(
    way: str, quantized: Quantized, exact: torch.Tensor, sentences: Sentences
) -> Row:
    embeddings = Embedder(quantized.model).eval()(sentences)
    cosine = (exact * embeddings).sum(-1)
    return {
        "way": way,
        "bits_per_weight": quantized.bits_per_weight,
        "mean_error": quantized.mean_error,
        "cosine": cosine.mean().item(),
        "least_cosine": cosine.min().item(),
        "same_neighbor": (nearest(exact) == nearest(embeddings)).double().mean().item(),
    }
