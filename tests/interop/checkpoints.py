"""Checkpoints as the rules see them: names, shapes and a config; and as files that engines load."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fqcompile.interop.layers import Layer, Scheme, last, stack_of

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
HIDDEN, HEADS, INNER, LAYERS, EXPERTS = 512, 512, 1024, 3, 4
INT4, INT8 = Scheme(4, 128), Scheme(8, 128)
LINEARS = [
    *((f"self_attn.{own}", HEADS, HIDDEN) for own in ("q_proj", "k_proj", "v_proj")),
    ("self_attn.o_proj", HIDDEN, HEADS),
]
HEAD_DIM, VOCAB = 128, 1000
HEAD = Layer("lm_head", VOCAB, HIDDEN)


def dense_model(
    scheme: Scheme | None = INT4, *, layers: int = LAYERS, inner: int = INNER
) -> list[Layer]:
    """A Llama with a dense head."""
    return [*_layers([*LINEARS, *_mlp("mlp", inner)], scheme, layers), HEAD]


def moe_model(
    scheme: Scheme | None = INT4, experts: Scheme | None = INT4, *, inner: int = INNER
) -> list[Layer]:
    """A Qwen3-MoE of three layers with dense routers."""
    own = [shape for e in range(EXPERTS) for shape in _mlp(f"mlp.experts.{e}", inner)]
    routers = _layers([("mlp.gate", EXPERTS, HIDDEN)], None)
    return [*_layers(LINEARS, scheme), *_layers(own, experts), *routers, HEAD]


def mixtral(layers: Iterable[Layer]) -> list[Layer]:
    """The same by Mixtral's names."""
    own = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    parts = [(layer, layer.name.split(".")) for layer in layers]
    return [replace(x, name=".".join(own.get(part, part) for part in names)) for x, names in parts]


def _mlp(at: str, inner: int) -> list[tuple[str, int, int]]:
    """Names, N and K of an MLP's linears."""
    up = [(f"{at}.{own}", inner, HIDDEN) for own in ("gate_proj", "up_proj")]
    return [*up, (f"{at}.down_proj", HIDDEN, inner)]


def _layers(
    shapes: Iterable[tuple[str, int, int]], scheme: Scheme | None, layers: int = LAYERS
) -> list[Layer]:
    shapes = list(shapes)
    return [
        Layer(f"model.layers.{i}.{own}", n, k, scheme)
        for i in range(layers)
        for own, n, k in shapes
    ]


def changed(layers: Sequence[Layer], ending: str, scheme: Scheme | None) -> list[Layer]:
    """Those whose names end so get another scheme."""
    assert any(layer.name.endswith(ending) for layer in layers)
    return [replace(x, scheme=scheme) if x.name.endswith(ending) else x for x in layers]


def config(*groups: tuple[Sequence[str], Scheme], ignore: Sequence[str] = ("lm_head",)) -> Any:
    """`config.json` with these groups in this order."""
    found = {f"group_{i}": group(targets, scheme) for i, (targets, scheme) in enumerate(groups)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": found,
            "ignore": list(ignore),
        },
    }


def group(targets: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


def write(directory: Path, content: Any, layers: Iterable[Layer]) -> Path:
    """The files of such a checkpoint: a model that an engine can load, with random codes."""
    directory.mkdir(parents=True, exist_ok=True)
    layers, rng = list(layers), torch.Generator().manual_seed(0)
    whole = whole_config(content, layers)
    (directory / "config.json").write_text(json.dumps(whole))
    tensors = _norms(whole["model_type"], layers)
    if not any(layer.name == "model.embed_tokens" for layer in layers):
        layers.append(Layer("model.embed_tokens", VOCAB, HIDDEN))
    for layer in layers:
        if layer.scheme is None:
            weight = torch.rand(layer.n, layer.k, generator=rng).to(torch.bfloat16)
            tensors[f"{layer.name}.weight"] = weight
            continue
        bits, groups = layer.scheme.bits, layer.scheme.groups(layer.k)
        parts = {
            "weight_packed": _words(layer.n, -(-layer.k * bits // 32), rng),
            "weight_scale": torch.rand(layer.n, groups, generator=rng).to(torch.bfloat16),
            "weight_shape": torch.tensor([layer.n, layer.k]),
        }
        if not layer.scheme.symmetric:
            parts["weight_zero_point"] = _words(-(-layer.n * bits // 32), groups, rng)
        tensors |= {f"{layer.name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def whole_config(content: Any, layers: Sequence[Layer]) -> Any:
    """With what it says of the model whose layers these are."""
    return {**content, **_model(content.get("model_type") or _kind(layers), layers)}


def _words(rows: int, columns: int, rng: torch.Generator) -> torch.Tensor:
    words = torch.randint(-(2**31), 2**31, (rows, columns), generator=rng)
    return words.to(torch.int32)


def _kind(layers: Sequence[Layer]) -> str:
    names = [layer.name for layer in layers if stack_of(layer.name)]
    if not names:
        return "llama"
    return "mixtral" if "block_sparse_moe" in names[0] else "qwen3_moe"


def _depth(layers: Sequence[Layer]) -> int:
    return 1 + max(int(x.name.split(".")[2]) for x in layers if ".layers." in x.name)


def _model(kind: str, layers: Sequence[Layer]) -> dict[str, Any]:
    """What `config.json` says of the model whose layers these are."""
    inner = next(x.k for x in layers if last(x.name) in ("down_proj", "w2"))
    experts = {"moe_intermediate_size": inner, "num_experts_per_tok": 2}
    experts |= dict.fromkeys(("num_local_experts", "num_experts"), EXPERTS)
    return {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "hidden_size": HIDDEN,
        "head_dim": HEAD_DIM,
        "num_attention_heads": HEADS // HEAD_DIM,
        "num_key_value_heads": HEADS // HEAD_DIM,
        "num_hidden_layers": _depth(layers),
        "intermediate_size": inner,
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
        **(experts if kind in ("mixtral", "qwen3_moe") else {}),
    }


def _norms(kind: str, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
    own = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if kind.startswith("qwen3"):
        own |= {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
    depth = range(_depth(layers))
    sizes = {f"model.layers.{i}.{name}": size for i in depth for name, size in own.items()}
    sizes["model.norm"] = HIDDEN
    return {f"{name}.weight": torch.ones(n, dtype=torch.bfloat16) for name, n in sizes.items()}
