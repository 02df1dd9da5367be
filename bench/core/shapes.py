"""What is measured, by name: linear layers, layers of experts and decoders of well-known models."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fqcompile.demo.gemma import load_gemma
from fqcompile.errors import OptionError
from fqcompile.kernels.spec import GemmSpec, Gpu

OURS = "fqcompile"  # what the names of our ways begin with
# Of activations.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Of each model: q, k and v stacked; the output projection; up, or gate over up; down.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama-3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "opt-30b": ((21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672)),
    "opt-66b": ((27648, 9216), (9216, 9216), (36864, 9216), (9216, 36864)),
    "opt-175b": ((36864, 12288), (12288, 12288), (49152, 12288), (12288, 49152)),
    "opt-6.7b": ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)),
    "encoders": ((384, 384), (1536, 384), (384, 1536), (1536, 1536)),
    "gemma-3-270m": ((1536, 640), (640, 1024), (4096, 640), (640, 2048)),
    "squares": ((4096, 4096), (8192, 8192), (16384, 16384)),
}
# What serving such models multiplies: N, K and whether gate and up are one matrix of 2 N rows.
SERVED: dict[str, tuple[tuple[int, int, bool], ...]] = {
    "qwen3-32b": (
        (10240, 5120, False), (5120, 8192, False), (25600, 5120, True), (5120, 25600, False)
    ),
    "llama-3.3-70b": (
        (10240, 8192, False), (8192, 8192, False), (28672, 8192, True), (8192, 28672, False)
    ),
    "llama-3.3-70b, a rank of 8": (
        (1280, 8192, False), (8192, 1024, False), (3584, 8192, True), (8192, 3584, False)
    ),
    "llama-3-8b": (
        (6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False)
    ),
    "gpt-oss-120b": ((5120, 2880, False), (2880, 4096, False)),
    "deepseek-v3": (
        (1536, 7168, False), (24576, 1536, False), (576, 7168, False), (7168, 16384, False),
        (18432, 7168, True), (7168, 18432, False),
    ),
    "qwen3-30b-a3b": ((5120, 2048, False), (2048, 4096, False)),
}  # fmt: skip
_SHAPE = re.compile(r"(\d+)x(\d+)")


class Shape(NamedTuple):
    """A weight of N rows and K columns, and the set that it is of."""

    source: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


def parse_shapes(names: Sequence[str]) -> list[Shape]:
    """The shapes of each name, which is that of a set or "NxK"; each N and K once.

    Raises:
        OptionError: a name is neither, or a side is empty.
    """
    found: dict[tuple[int, int], Shape] = {}
    for name in names:
        for n, k in SHAPES.get(name) or [_sides(name)]:
            found.setdefault((n, k), Shape(name if name in SHAPES else "given", n, k))
    return list(found.values())


def _sides(name: str) -> tuple[int, int]:
    match = _SHAPE.fullmatch(name)
    if match is None:
        sets = ", ".join(SHAPES)
        raise OptionError(f"shape {name!r} is neither N x K, such as 4096x14336, nor one of {sets}")
    n, k = map(int, match.groups())
    if not n or not k:
        raise OptionError(f"shape {name!r} has an empty side; N and K are at least 1")
    return n, k


class ExpertShape(NamedTuple):
    """The experts of a model's layer: gate_up [E, 2 I, H] and down [E, H, I]."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


EXPERTS = {
    "qwen3-30b-a3b": ExpertShape(128, 8, 2048, 768),
    "mixtral-8x7b": ExpertShape(8, 2, 4096, 14336),
}
# What serving routes beside these: too large to be measured by default.
SERVED_EXPERTS = EXPERTS | {
    "gpt-oss-120b": ExpertShape(128, 4, 2880, 2880),
    "deepseek-v3": ExpertShape(256, 8, 7168, 2048),
}
Matrix = Literal["gate_up", "down"]
RoutingName = Literal["grouped", "gathered"]
MATRICES: tuple[Matrix, ...] = ("gate_up", "down")
GROUPED_MM = "torch._grouped_mm"  # what ours is compared with


def expert_spec(
    shape: ExpertShape, matrix: Matrix, routing: RoutingName, tokens: int, bits: int,
    group_size: int, dtype: torch.dtype, gpu: Gpu | None, device: str = "cuda",
) -> GemmSpec:  # fmt: skip
    """gate_up [E, 2 I, H] with silu(gate) * up, or down [E, H, I]; I intermediate, H hidden."""
    gated = matrix == "gate_up"
    n, k = shape.intermediate, shape.hidden
    if not gated:
        n, k = k, n
    return GemmSpec(
        tokens * shape.top_k, n, k, bits, min(group_size, k), dtype, dtype, device,
        "silu" if gated else "none", gated, gpu=gpu, experts=shape.experts, routing=routing,
    )  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """A model's shape: `kind` is its name in transformers; `layers` is how many it has.

    timed: how many of them are timed unless asked otherwise, so that two copies fit one GPU.
    """

    kind: str
    layers: int
    timed: int
    sizes: Mapping[str, Any] = field(default_factory=dict)


def _llama(hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }


def _opt(hidden: int, heads: int, vocab: int = 50272) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "word_embed_proj_dim": hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }


GEMMA = "gemma-3-270m"
_QWEN3 = {
    **_llama(2048, 6144, 32, 4, 151936),
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}

MODELS = {
    "llama-3-8b": Decoder("Llama", 32, 32, _llama(4096, 14336, 32, 8, 128256)),
    "opt-30b": Decoder("OPT", 48, 8, _opt(7168, 56)),
    "opt-175b": Decoder("OPT", 96, 4, _opt(12288, 96)),
    "llama-1b": Decoder(
        "Llama", 16, 16, {**_llama(2048, 8192, 32, 8, 128256), "tie_word_embeddings": True}
    ),
    "qwen3-30b-a3b": Decoder("Qwen3Moe", 48, 2, _QWEN3),
    GEMMA: Decoder("Gemma3", 18, 18),  # the only one with real weights
    "llama": Decoder("Llama", 32, 2, _llama(4096, 14336, 32, 8, 32000)),
    "small": Decoder("Llama", 4, 4, _llama(1024, 2816, 16, 4, 32000)),
    "tiny": Decoder("Llama", 4, 2, _llama(256, 512, 4, 2, 512)),
    "tiny-opt": Decoder("OPT", 4, 2, _opt(256, 4, 512)),
    "tiny-moe": Decoder(
        "Qwen3Moe",
        4,
        2,
        {
            **_QWEN3,
            **_llama(256, 512, 4, 2, 512),
            "head_dim": 64,
            "moe_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
}
LARGE = ("llama-3-8b", "opt-30b", "opt-175b")  # measured where no others are asked for

STARTED = ("llama", "tiny")  # of which whole starts and exports are measured


def classes(name: str) -> tuple[Any, Any]:
    """Those of its configuration and of the model, imported."""
    library, kind = import_module("transformers"), MODELS[name].kind
    return getattr(library, f"{kind}Config"), getattr(library, f"{kind}ForCausalLM")


def build(
    name: str, layers: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> nn.Module:
    """The model with its first `layers` layers, frozen; on "meta" without any weights.

    A weight of K columns has a standard deviation of K**-1/2, as trained ones about have: values
    keep their size from layer to layer. Gemma has its own weights, and all layers.

    Raises:
        OptionError: Gemma with fewer layers than it has.
    """
    if name == GEMMA:
        if layers != MODELS[name].layers:
            raise OptionError(
                f"layers={layers}: {name} has real weights, all {MODELS[name].layers}"
            )
        return load_gemma(dtype)[0].requires_grad_(False).to(device)
    config_type, model_type = classes(name)
    config = config_type(**MODELS[name].sizes, num_hidden_layers=layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = model_type(config)
    finally:
        torch.set_default_dtype(before)
    if torch.device(device).type != "meta":
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


def prompt(name: str, tokens: int = 16) -> Tensor:
    """Of one sequence, [1, tokens]."""
    return torch.arange(tokens)[None] % MODELS[name].sizes["vocab_size"]


def parameter_bytes(model: nn.Module) -> int:
    """Each parameter once, however many modules share it."""
    return sum(parameter.nbytes for parameter in model.parameters())
