"""Checkpoints as the rules see them: names, shapes and a config; and as files, with empty codes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fqcompile.interop.layers import Layer, Scheme

HIDDEN, HEADS, INNER, LAYERS, EXPERTS = 512, 512, 1024, 3, 4
INT4, INT8 = Scheme(4, 128), Scheme(8, 128)
LINEARS = [
    *((f"self_attn.{own}", HEADS, HIDDEN) for own in ("q_proj", "k_proj", "v_proj")),
    ("self_attn.o_proj", HIDDEN, HEADS),
]
MLP = [("gate_proj", INNER, HIDDEN), ("up_proj", INNER, HIDDEN), ("down_proj", HIDDEN, INNER)]
HEAD = Layer("lm_head", 1000, HIDDEN)


def dense_model(scheme: Scheme | None = INT4) -> list[Layer]:
    """A Llama of three layers and a dense head."""
    shapes = [*LINEARS, *((f"mlp.{own}", n, k) for own, n, k in MLP)]
    return [*_layers(shapes, scheme), HEAD]


def moe_model(scheme: Scheme | None = INT4, experts: Scheme | None = INT4) -> list[Layer]:
    """A Mixture of Experts of three layers with dense routers."""
    own = [(f"mlp.experts.{e}.{p}", n, k) for e in range(EXPERTS) for p, n, k in MLP]
    routers = _layers([("mlp.gate", EXPERTS, HIDDEN)], None)
    return [*_layers(LINEARS, scheme), *_layers(own, experts), *routers, HEAD]


def _layers(shapes: Iterable[tuple[str, int, int]], scheme: Scheme | None) -> list[Layer]:
    shapes = list(shapes)
    return [
        Layer(f"model.layers.{i}.{own}", n, k, scheme)
        for i in range(LAYERS)
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
    """The files of such a checkpoint; codes are zeros, scales ones."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    tensors = {"model.embed_tokens.weight": torch.zeros(1000, HIDDEN, dtype=torch.bfloat16)}
    for layer in layers:
        if layer.scheme is None:
            tensors[f"{layer.name}.weight"] = torch.zeros(layer.n, layer.k, dtype=torch.bfloat16)
            continue
        words = -(-layer.k * layer.scheme.bits // 32)
        groups = 1 if layer.scheme.group_size is None else -(-layer.k // layer.scheme.group_size)
        tensors[f"{layer.name}.weight_packed"] = torch.zeros(layer.n, words, dtype=torch.int32)
        tensors[f"{layer.name}.weight_scale"] = torch.ones(layer.n, groups, dtype=torch.bfloat16)
        tensors[f"{layer.name}.weight_shape"] = torch.tensor([layer.n, layer.k])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
