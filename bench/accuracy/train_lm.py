"""Small language models with trained weights, of three families: OPT, Llama and Mixtral.

    python -m bench train_lm [--family opt llama mixtral] [--size small] [--again]

Hugging Face classes, fp32, trained on the standard library's text (see corpus.py) from a fixed
seed, kept in the cache directory and loaded from there the next time. Prints each model's bits per
byte of held-out files beside what the frequencies of bytes alone would give. "small" is a few
million parameters, some minutes of one core. "100m" wants a GPU; it has not been run.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

from bench.accuracy.corpus import Corpus, Document, stdlib_corpus
from bench.accuracy.language_model import Trained, evaluate, windows_of
from fqcompile.files.trusted import replace_text
from fqcompile.kernels.tuning.table import cache_directory

BOS = "<s>"
_WEIGHT_DECAY, _BETAS, _CLIP, _WARM_UP = 0.1, (0.9, 0.95), 1.0, 0.06


@dataclass(frozen=True)
class Size:
    """Widths of the models, and how they are trained."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    batch: int
    steps: int
    learning_rate: float

    @property
    def sizes(self) -> dict[str, Any]:
        """What the configurations of all families have in common."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": None,
        }


SIZES = {
    "tiny": Size(128, 1, 2, 300, 64, 4, 30, 3e-3),
    "quick": Size(256, 2, 4, 512, 128, 4, 100, 3e-3),
    "small": Size(256, 4, 4, 1024, 256, 4, 3000, 1e-3),
    "100m": Size(768, 12, 12, 4096, 1024, 32, 4000, 6e-4),
}


def _opt(size: Size) -> Any:
    widths = {"ffn_dim": 4 * size.width, "word_embed_proj_dim": size.width}
    return hf.OPTForCausalLM(hf.OPTConfig(**size.sizes, **widths, dropout=0.0))


def _llama(size: Size) -> Any:
    heads = {"num_key_value_heads": size.heads // 2}
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**size.sizes, **heads, intermediate_size=3 * size.width)
    )


def _mixtral(size: Size) -> Any:
    config = hf.MixtralConfig(
        **size.sizes,
        num_key_value_heads=size.heads // 2,
        intermediate_size=2 * size.width,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,  # adds the loss that keeps experts equally busy
        router_aux_loss_coef=0.01,
        sliding_window=None,
    )
    return hf.MixtralForCausalLM(config)


FAMILIES: dict[str, Callable[[Size], nn.Module]] = {
    "opt": _opt,
    "llama": _llama,
    "mixtral": _mixtral,
}


def build(family: str, size: Size, seed: int = 0) -> nn.Module:
    """The model before training; the same weights for the same seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return FAMILIES[family](size)


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: every text has tokens and comes back from them; token 0 begins a window."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def batches(tokens: Tensor, size: Size, steps: int, seed: int) -> Iterator[Tensor]:
    """Windows [batch, context] from random places of the text, the begin token first in each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - size.context, (size.batch,), generator=generator)
        windows = torch.stack([tokens[start : start + size.context] for start in starts.tolist()])
        windows[:, 0] = 0
        yield windows


def learning_rate(step: int, steps: int) -> float:
    """A share of the peak: linear warm-up, then half a cosine down to a twentieth."""
    warm_up = max(1, int(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(model: nn.Module, tokens: Tensor, size: Size, device: str, name: str) -> nn.Module:
    """AdamW with decay on matrices alone, clipped gradients; the loss goes to the progress bar."""
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=size.learning_rate, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, size.steps))
    progress = tqdm(batches(tokens, size, size.steps, seed=1), name, total=size.steps, disable=None)
    for windows in progress:
        windows = windows.to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(windows, labels=windows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.cpu().eval().requires_grad_(False)


def folder(family: str, size: str, seed: int, corpus: Corpus) -> Path:
    """Where the trained model is kept: one folder for all that decides what it becomes."""
    recipe = [family, asdict(SIZES[size]), seed, corpus.digest, hf.__version__, torch.__version__]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    return cache_directory() / "language-models" / f"{family}-{size}-{digest}"


def trained(
    family: str, size: str = "small", seed: int = 0, device: str = "cpu", again: bool = False
) -> Trained:
    """The trained model in fp32, from the cache or trained now.

    Raises:
        OSError: the cache directory cannot be written.
    """
    corpus = stdlib_corpus()
    place = folder(family, size, seed, corpus)
    if again or not (place / "about.json").is_file():
        _train_into(place, family, SIZES[size], seed, corpus, device)
    model = build(family, SIZES[size], seed)
    model.load_state_dict(torch.load(place / "weights.pt", weights_only=True))
    about = json.loads((place / "about.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    return Trained(model.eval().requires_grad_(False), tokenizer, about)


def _train_into(
    place: Path, family: str, size: Size, seed: int, corpus: Corpus, device: str
) -> None:
    """about.json comes last: a folder without it is one whose training was stopped."""
    place.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus.train, size.vocabulary)
    tokenizer.save(str(place / "tokenizer.json"))
    encoded = tokenizer.encode_batch([d.text for d in corpus.train])
    tokens = torch.tensor([token for text in encoded for token in (0, *text.ids)])
    start = time.monotonic()
    model = train(build(family, size, seed), tokens, size, device, family)
    seconds = time.monotonic() - start
    windows = windows_of(corpus.held_out, tokenizer, size.context, most=2)
    about = {
        "family": family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": size.steps * size.batch * size.context,
        "seconds": round(seconds),
        "bits_per_byte": evaluate(model, windows).bits_per_byte,
        "bytes_alone": byte_entropy(corpus),
        "corpus": corpus.digest,
        "seed": seed,
        "size": asdict(size),
    }
    torch.save(model.state_dict(), place / "weights.pt")
    replace_text(place / "about.json", json.dumps(about, indent=1) + "\n")


def byte_entropy(corpus: Corpus) -> float:
    """Bits per byte of the held-out text under the frequencies of bytes in the training text."""
    counts = _byte_counts(corpus.train) + 1
    held_out = _byte_counts(corpus.held_out)
    return -((counts / counts.sum()).log2() * held_out).sum().item() / held_out.sum().item()


def _byte_counts(documents: Sequence[Document]) -> Tensor:
    whole = bytearray("".join(d.text for d in documents).encode())
    return torch.frombuffer(whole, dtype=torch.uint8).bincount(minlength=256).double()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--again", action="store_true", help="train even if the cache has it")
    arguments = parser.parse_args(argv)
    chosen = arguments.size, arguments.seed, arguments.device, arguments.again
    for family in arguments.family:
        about = trained(family, *chosen).about
        print(", ".join(f"{key} {value}" for key, value in about.items() if key != "size"))


if __name__ == "__main__":
    main()
