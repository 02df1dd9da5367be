"""A language model's bits per byte on held-out documents, and which token it finds likeliest.

A document is cut into windows, each after a begin token of its own, so that every token is
predicted once and the bits are those of all its bytes:

    bits per byte = sum over tokens of -log2 p(token | those before it in the window) / bytes
    divergence    = sum over tokens of KL(fp32's p || the quantized model's p), in bits, / bytes

The loss of bits per byte is the difference of two numbers that chance moves, and of a model that is
not converged it may be negative; the divergence is zero only where all predictions are the same,
and is what the loss would be on text that fp32 models perfectly. So it tells near ways apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bench.accuracy.corpus import Document

IGNORED = -100
_BATCH = 16


@dataclass(frozen=True)
class Windows:
    """Tokens [W, T] behind the begin token, filled up with it; targets [W, T], IGNORED at the end.

    `document[w]` is the number of the document that window w is of, `bytes[d]` the length of what
    is predicted of document d.
    """

    tokens: Tensor
    targets: Tensor
    document: Tensor
    bytes: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Bits [D] and bytes [D] of each document; the likeliest token [T] of each prediction.

    `log_probs` [T, V] are kept of a model that others are compared with; `divergence` [D] in bits
    is that from such a model, zeros where there is none.
    """

    bits: Tensor
    bytes: Tensor
    likeliest: Tensor
    divergence: Tensor
    log_probs: Tensor | None = None

    @property
    def bits_per_byte(self) -> float:
        return (self.bits.sum() / self.bytes.sum()).item()

    def agreement(self, other: "Evaluation") -> float:
        """Share of predictions whose likeliest token is the same."""
        return (self.likeliest == other.likeliest).double().mean().item()


@dataclass(frozen=True)
class Trained:
    """A trained model, its tokenizer, and what is known of its training."""

    model: nn.Module
    tokenizer: Tokenizer
    about: dict[str, Any]


def windows_of(
    documents: Sequence[Document], tokenizer: Tokenizer, context: int, most: int, begin: int = 0
) -> Windows:
    """At most `most` windows of each document, from its start, each of `context` - 1 tokens."""
    tokens, targets, owners, lengths = [], [], [], []
    for number, document in enumerate(documents):
        encoded = tokenizer.encode(document.text, add_special_tokens=False)
        ids = encoded.ids[: most * (context - 1)]
        lengths.append(len(tokenizer.decode(ids).encode()))
        for start in range(0, len(ids), context - 1):
            part = ids[start : start + context - 1]
            missing = context - 1 - len(part)
            tokens.append([begin, *part[:-1], *[begin] * missing])
            targets.append([*part, *[IGNORED] * missing])
            owners.append(number)
    return Windows(*map(torch.tensor, (tokens, targets, owners, lengths)))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows, exact: Evaluation | None = None) -> Evaluation:
    """Of each token given those before it, summed in float64; log_probs if there is no `exact`."""
    bits, divergence = torch.zeros(2, len(windows.bytes), dtype=torch.float64)
    kept: list[Tensor] = []
    likeliest: list[Tensor] = []
    for part in torch.arange(len(windows.tokens)).split(_BATCH):
        targets = windows.targets[part]
        asked = targets != IGNORED
        log_probs = model(windows.tokens[part]).logits[asked].float().log_softmax(-1)
        owners = windows.document[part, None].expand_as(targets)[asked]
        losses = -log_probs.gather(1, targets[asked][:, None])[:, 0]
        bits.index_add_(0, owners, losses.double() / math.log(2))
        if exact is None:
            kept.append(log_probs)
        elif exact.log_probs is not None:
            done = sum(map(len, likeliest))
            known = exact.log_probs[done : done + len(log_probs)]
            distances = (known.exp() * (known - log_probs)).sum(-1)
            divergence.index_add_(0, owners, distances.double() / math.log(2))
        likeliest.append(log_probs.argmax(-1))
    whole = torch.cat(kept) if kept else None
    return Evaluation(bits, windows.bytes, torch.cat(likeliest), divergence, whole)
