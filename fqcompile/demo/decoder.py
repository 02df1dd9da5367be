"""The demo's second half: greedy generation with a static cache, compared with Inductor."""

import copy
import resource
import time
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fqcompile.demo import tell, telling
from fqcompile.modules.fake_quantize import fake_quantize_
from fqcompile.report import reports

PROMPT_TOKENS = 16
# OPT-125m with half its layers.
OPT_SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "word_embed_proj_dim": 768,
    "vocab_size": 50272,
}


@dataclass
class Generation:
    """One backend's greedy generation: its tokens, and seconds per round."""

    model: nn.Module
    tokens: Tensor | None = None
    seconds: list[float] = field(default_factory=list)


def run_decoder_demo(model: nn.Module, label: str, new_tokens: int, rounds: int) -> None:
    """Print tokens/s of int4 and int8 against Inductor, memory, and a check of the tokens."""
    prompt = torch.arange(PROMPT_TOKENS)[None] + 10
    tell(
        f"\n\nDecoder: {label}, bf16, prompt of {PROMPT_TOKENS}, {new_tokens} new tokens, "
        "greedy generate() with a static cache\n\n"
        f"Compiling it and generating once, about a minute the first time; then {rounds} rounds:"
    )
    runs = {
        "eager": Generation(model),
        "inductor": _compiled(model, backend="inductor"),
        "finequant int8": _compiled(model, backend="finequant", options={"bits": 8}),
        "finequant int4": _compiled(model, backend="finequant", options={"bits": 4}),
    }
    for name, generation in runs.items():
        with telling(name):
            _generate(generation.model, prompt, new_tokens)
    for round_number in range(rounds):
        with telling(f"round {round_number + 1} of {rounds}"):
            for generation in runs.values():
                start = time.perf_counter()
                generation.tokens = _generate(generation.model, prompt, new_tokens)
                generation.seconds.append(time.perf_counter() - start)
    print(f"\n{reports()[-1].plan.totals}")
    _print_speed(runs, new_tokens)
    _print_agreement(model, runs["finequant int4"], prompt, new_tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"Peak memory of this process, all backends and original weights included: {peak:.2f} GiB"
    )


def random_decoder() -> nn.Module:
    """The model measured if no checkpoint is given: half of OPT-125m, with random weights."""
    transformers = import_module("transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(**OPT_SHAPE)
    model: nn.Module = transformers.OPTForCausalLM(config).to(torch.bfloat16).eval()
    return model


def _compiled(model: nn.Module, **arguments: Any) -> Generation:
    """The model with a compiled forward; the weights are shared."""
    own = copy.copy(model)
    own.__dict__ = dict(model.__dict__)
    own.forward = torch.compile(model.forward, **arguments)
    return Generation(own)


def _generate(model: nn.Module, prompt: Tensor, new_tokens: int) -> Tensor:
    output: Tensor = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    return output[0, prompt.shape[1] :]


def _print_speed(runs: dict[str, Generation], new_tokens: int) -> None:
    medians = {name: sorted(g.seconds)[len(g.seconds) // 2] for name, g in runs.items()}
    base = medians["inductor"]
    rows = [
        (name, f"{new_tokens / seconds:.1f}", f"{base / seconds:.2f}x")
        for name, seconds in medians.items()
    ]
    print("\nMedian of interleaved rounds, prompt included:\n")
    print(tabulate(rows, ("backend", "tokens/s", "speed"), disable_numparse=True))


def _print_agreement(model: nn.Module, int4: Generation, prompt: Tensor, new_tokens: int) -> None:
    oracle = fake_quantize_(copy.deepcopy(model), reports()[-1])
    expected = _generate(oracle, prompt, new_tokens)
    assert int4.tokens is not None
    same = int((expected == int4.tokens).sum())
    print(
        f"\nThe int4 tokens against the same model with each weight replaced by its dequantized "
        f"value, eager: {same} of {new_tokens} equal"
    )
