"""A language model's bits per byte on held-out documents, and which token it finds likeliest.

A document is cut into windows, each after a begin token of its own, so that every token is
predicted once and the bits are those of all its bytes:

    bits per byte = sum over tokens of -log2 p(token | those before it in the window) / bytes
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.corpus import Document

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
    """Bits [D] and bytes [D] of each document; the likeliest token [T] of each prediction."""

    bits: Tensor
    bytes: Tensor
    likeliest: Tensor

    @property
    def bits_per_byte(self) -> float:
        return (self.bits.sum() / self.bytes.sum()).item()

    def agreement(self, other: "Evaluation") -> float:
        """Share of predictions whose likeliest token is the same."""
        return (self.likeliest == other.likeliest).double().mean().item()


@dataclass(frozen=True)
class Trained:
    """A trained model, its tokeniser, and what is known of its training."""

    model: nn.Module
    tokenizer: Tokenizer
    about: dict[str, Any]


def windows_of(
    documents: Sequence[Document], tokenizer: Tokenizer, context: int, most: int
) -> Windows:
    """At most `most` windows of each document, from its start, each of `context` - 1 tokens."""
    tokens, targets, owners, lengths = [], [], [], []
    for number, document in enumerate(documents):
        ids = tokenizer.encode(document.text).ids[: most * (context - 1)]
        lengths.append(len(tokenizer.decode(ids).encode()))
        for start in range(0, len(ids), context - 1):
            part = ids[start : start + context - 1]
            missing = context - 1 - len(part)
            tokens.append([0, *part[:-1], *[0] * missing])
            targets.append([*part, *[IGNORED] * missing])
            owners.append(number)
    return Windows(*map(torch.tensor, (tokens, targets, owners, lengths)))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows) -> Evaluation:
    """Of each token given those before it; bits are summed in float64."""
    bits = torch.zeros(len(windows.bytes), dtype=torch.float64)
    likeliest = []
    for part in torch.arange(len(windows.tokens)).split(_BATCH):
        logits = model(windows.tokens[part]).logits.float()
        targets = windows.targets[part]
        losses = cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        per_window = losses.view(targets.shape).double().sum(1) / math.log(2)
        bits.index_add_(0, windows.document[part], per_window)
        likeliest.append(logits.argmax(-1)[targets != IGNORED])
    return Evaluation(bits, windows.bytes, torch.cat(likeliest))
