"""Gemma 3 270M: a language model with real weights that a package index has.

The package holds a GGUF file of 4- to 8-bit matrices. Their grids would favor whoever rounds to
similar ones, so each weight is moved within its own cell of the grid by a seeded uniform draw:
that model is the reference, and every way quantizes it alike.

The 262144 logits of a token would cost more than all layers. Predictions are over the 16384 tokens
that the reference finds likeliest on these texts, with every token of the texts among them.
"""

import ast
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bench.accuracy.corpus import Document
from bench.accuracy.language_model import IGNORED, Windows, windows_of
from fqcompile.demo.gemma import FILE, gemma_folder, load_gemma

_BEGIN, _CONTEXT, _LEAST = 2, 128, 2500  # characters that surely fill a window
_VOCABULARY, _ROWS = 16384, 64
# Names in the file of the matrices, and in the model.
_NAMES = {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_BLOCKS = {"Q6_K": 16}  # weights that share a step; 32 in the other types


def dithered_gemma() -> tuple[nn.Module, Tokenizer]:
    """The model in fp32 and its tokenizer."""
    model, tokenizer = load_gemma(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for matrix in matrices():
        weight = model.get_parameter(matrix.name).data
        weight += (torch.rand(weight.shape, generator=generator) - 0.5) * matrix.steps
    return model.requires_grad_(False), tokenizer.backend_tokenizer


class FileMatrix(NamedTuple):
    """A layer's matrix in the file: its values and the distances of those next to them, [N, K]."""

    name: str
    values: Tensor
    steps: Tensor
    bits: float


def matrices() -> Iterator[FileMatrix]:
    """The file's, by their names in the model."""
    library = import_module("gguf")
    for tensor in library.GGUFReader(gemma_folder() / FILE).tensors:
        layer, _, kind = tensor.name.removeprefix("blk.").removesuffix(".weight").partition(".")
        if kind not in _NAMES:
            continue
        w = torch.from_numpy(library.dequantize(tensor.data, tensor.tensor_type))
        blocks = w.unflatten(1, (-1, _BLOCKS.get(tensor.tensor_type.name, 32)))
        gaps = blocks.sort(-1).values.diff(dim=-1)
        steps = gaps.masked_fill(gaps < 1e-7, torch.inf).amin(-1, keepdim=True)
        steps = steps.masked_fill(steps.isinf(), 0).expand_as(blocks).reshape(w.shape)
        name = f"model.layers.{layer}.{_NAMES[kind]}.weight"
        yield FileMatrix(name, w, steps, 8 * int(tensor.n_bytes) / w.numel())


class NarrowHead(nn.Module):
    """The decoder with the logits of some tokens alone: [B, T, kept]."""

    def __init__(self, model: Any, kept: Tensor) -> None:
        super().__init__()
        self.model = model.model
        self.register_buffer("head", model.lm_head.weight[kept])

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=hidden @ self.head.T)


def narrowed(model: Any, windows: Windows, size: int = _VOCABULARY) -> tuple[NarrowHead, Windows]:
    """The model and the windows with the targets numbered in the `size` tokens that matter."""
    mass = torch.zeros(model.config.vocab_size)
    with torch.no_grad():
        for tokens in windows.tokens.split(4):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            for rows in hidden.flatten(0, 1).split(_ROWS):
                mass += model.lm_head(rows).softmax(-1).sum(0)
    asked = windows.targets != IGNORED
    mass[windows.targets[asked]] = torch.inf
    kept = mass.topk(size).indices.sort().values
    numbers = torch.searchsorted(kept, windows.targets.clamp_min(0))
    targets = torch.where(asked, numbers, IGNORED)
    narrow = Windows(windows.tokens, targets, windows.document, windows.bytes)
    return NarrowHead(model, kept).eval(), narrow


def gemma_windows(tokenizer: Tokenizer, documents: Sequence[Document], most: int = 1) -> Windows:
    """At most `most` windows of each document."""
    return windows_of(documents, tokenizer, _CONTEXT, most, begin=_BEGIN)


def texts(corpus: Sequence[Document], count: int) -> list[Document]:
    """Documentation strings of `count` files, and the code of as many others."""
    prose: list[Document] = []
    code: list[Document] = []
    for document in corpus:
        if not document.name.endswith(".py") or len(prose) + len(code) == 2 * count:
            continue
        text = docstrings(document.text)
        if len(text) >= _LEAST and len(prose) < count:
            prose.append(Document(document.name, text))
        elif len(document.text) >= 4 * _LEAST and len(code) < count:
            # Past what files begin with: licenses, imports.
            code.append(Document(document.name, document.text[len(document.text) // 4 :]))
    return [*prose, *code]


def docstrings(source: str) -> str:
    """Of all functions, classes and the module; nothing where the source is of another Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that are no escapes
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return ""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    return "\n\n".join(
        text for n in ast.walk(tree) if isinstance(n, kinds) and (text := ast.get_docstring(n))
    )
