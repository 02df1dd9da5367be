"""A Llama or Qwen3-MoE of transformers as a GGUF file, and the weights that such a file holds.

Matrices are rounded by the package `gguf`, in blocks of 32 of a row: Q4_0 has one fp16 scale and 16
levels, Q8_0 one and 255. Norms and routers stay fp32, as llama.cpp wants them. There is no
tokenizer: what reads the file is given numbers of tokens.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fqcompile.errors import OptionError

ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}  # transformers' names, and GGUF's
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_PLAIN = ("norm.weight", "mlp.gate.weight")


class Types(NamedTuple):
    """GGUF's names of the types of matrices: of the layers, of the embedding and the head."""

    layers: str = "Q4_0"
    tables: str = "Q8_0"


_DEFAULT = Types()


def write(model: nn.Module, path: Path, types: Types = _DEFAULT) -> None:
    """Write the model's configuration and weights.

    Raises:
        OptionError: the model is of another architecture than ARCHITECTURES.
    """
    library = import_module("gguf")
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        raise OptionError(
            f"model_type={config.model_type!r}: GGUF is written of {[*ARCHITECTURES]}"
        )
    writer = library.GGUFWriter(path, ARCHITECTURES[config.model_type])
    _describe(writer, config)
    quantize, kinds = library.quantize, library.GGMLQuantizationType
    for name, key, value in _tensors(model):
        plain = key.endswith(_PLAIN)
        kind = kinds["F32" if plain else types.tables if key in _TABLES else types.layers]
        values = _turned(key, value, config, (2, -1)).float().numpy()
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Of each weight its name in the file, its name in the model, and a view of it."""
    library = import_module("gguf")
    config: Any = model.config
    arch = ARCHITECTURES[config.model_type]
    kind = next(k for k, name in library.MODEL_ARCH_NAMES.items() if name == arch)
    names = library.get_tensor_name_map(kind, config.num_hidden_layers)
    for key, parameter in model.named_parameters():  # a tied head is not named twice
        for part, value in _parts(key, parameter.detach()):
            stem, dot, _ = part.rpartition(".weight")
            found = names.get_name(stem if dot else part)
            assert found, f"GGUF has no name for {part}"
            yield f"{found}.weight", part, value


def _parts(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Gates and ups of experts are one stack here, [E, 2 I, H], and two in the file."""
    if not key.endswith("gate_up_proj"):
        yield key, value
        return
    for name, half in zip(("gate_proj", "up_proj"), value.chunk(2, 1), strict=True):
        yield key.replace("gate_up_proj", name), half


def _turned(key: str, value: Tensor, config: Any, sides: tuple[int, int]) -> Tensor:
    """Llama's rotary embedding turns pairs of rows of q and k: those half a head apart in the
    model, neighbors in the file. From the one to the other with `sides` (2, -1), back with (-1, 2).
    """
    heads = {"q_proj.weight": config.num_attention_heads}
    heads["k_proj.weight"] = config.num_key_value_heads
    count = next((n for name, n in heads.items() if key.endswith(name)), None)
    if config.model_type != "llama" or count is None:
        return value
    return value.unflatten(0, (count, *sides)).transpose(1, 2).flatten(0, 2)


def read_into(model: nn.Module, path: Path) -> None:
    """Replace the weights of a model by those of its file, rounded as they are there."""
    library = import_module("gguf")
    held = {tensor.name: tensor for tensor in library.GGUFReader(path).tensors}
    for name, key, value in _tensors(model):
        stored = library.dequantize(held[name].data, held[name].tensor_type)
        value.copy_(_turned(key, torch.from_numpy(stored), model.config, (-1, 2)))


def bytes_read(path: Path, hit: float) -> float:
    """Of the file's weights those that a token's pass reads: of experts `hit`, of the embedding
    none unless it is the head too."""
    tensors = import_module("gguf").GGUFReader(path).tensors
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    return sum(
        int(tensor.n_bytes) * (hit if "_exps." in tensor.name else 1)
        for tensor in tensors
        if tied or tensor.name != "token_embd.weight"
    )
