"""From a Hugging Face config.json to a Decoder, by `model_type`; nothing is downloaded.

To add a family: a function here, and its line in FAMILIES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fqcompile.errors import EstimateError, nearest
from fqcompile.estimator.decoder import ConfigFields, Decoder, Experts, read_fields

NAMED_MODELS = Path(__file__).with_name("named_models")
_OPT_OFFSET = 2  # rows that OPT's table of positions begins with


@dataclass(frozen=True)
class Family:
    """How the configs of a model_type are read: the keys that must be there, and the reader."""

    keys: tuple[str, ...]
    read: Callable[[ConfigFields, str], Decoder]


def named_models() -> list[str]:
    """The models whose configs come with the package."""
    return sorted(path.stem for path in NAMED_MODELS.glob("*.json"))


def read_decoder(model: str) -> Decoder:
    """The shape of `model`: a named one, a config.json, or a directory that has one.

    Raises:
        EstimateError: there is no such file, its model_type is not known, or a key is wrong.
    """
    if model.lower() in named_models():
        path, name = NAMED_MODELS / f"{model.lower()}.json", model.lower()
    else:
        given = Path(model)
        path = given / "config.json" if given.is_dir() else given
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
    if not path.is_file():
        raise EstimateError(
            f"{model!r} is neither a config.json, nor a directory with one, nor one of "
            f"{', '.join(named_models())}{nearest(model, named_models())}"
        )
    return decoder_of(read_fields(path), name)


def decoder_of(fields: ConfigFields, name: str) -> Decoder:
    """The shape that the keys describe."""
    kind = fields.content.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        what = "lacks model_type" if kind is None else f"has the model_type {kind!r}"
        raise EstimateError(
            f"{fields.where} {what}; the estimator knows {', '.join(FAMILIES)}: describe the model "
            "by the keys of the one that it is most like"
        )
    fields.require(*family.keys)
    return family.read(fields, name)


def _llama(fields: ConfigFields, name: str) -> Decoder:
    return _decoder(fields, name, _vectors(fields))


def _qwen2(fields: ConfigFields, name: str) -> Decoder:
    return _decoder(fields, name, _vectors(fields, qkv_bias=True))


def _qwen3(fields: ConfigFields, name: str) -> Decoder:
    return _decoder(fields, name, _vectors(fields, qk_norms=True))


def _mixtral(fields: ConfigFields, name: str) -> Decoder:
    experts = _experts(fields, "intermediate_size")
    return _decoder(fields, name, _vectors(fields), experts, sparse=fields.count(_LAYERS))


def _olmoe(fields: ConfigFields, name: str) -> Decoder:
    experts = _experts(fields, "intermediate_size")
    heads = _attention_sizes(fields)
    norms = sum(heads[:2]) * heads[2]  # of all queries and all keys
    vectors = _vectors(fields) + fields.count(_LAYERS) * norms
    return _decoder(fields, name, vectors, experts, sparse=fields.count(_LAYERS))


def _qwen3_moe(fields: ConfigFields, name: str) -> Decoder:
    experts = _experts(fields, "moe_intermediate_size")
    vectors = _vectors(fields, qk_norms=True)
    return _decoder(fields, name, vectors, experts, sparse=_sparse_layers(fields))


def _qwen2_moe(fields: ConfigFields, name: str) -> Decoder:
    experts = _experts(fields, "moe_intermediate_size", shared=True)
    vectors = _vectors(fields, qkv_bias=fields.flag("qkv_bias", True))
    return _decoder(fields, name, vectors, experts, sparse=_sparse_layers(fields))


def _sparse_layers(fields: ConfigFields) -> int:
    """How many layers have experts: each `decoder_sparse_step`-th, but for the named ones."""
    step, dense = fields.count("decoder_sparse_step", 1), fields.layer_numbers("mlp_only_layers")
    layers = range(fields.count(_LAYERS))
    return sum((layer + 1) % step == 0 and layer not in dense for layer in layers)


def _experts(fields: ConfigFields, inner: str, shared: bool = False) -> Experts:
    found = Experts(
        fields.count(_EXPERTS),
        fields.count("num_experts_per_tok"),
        fields.count(inner),
        fields.count("shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
    )
    if found.per_token > found.count:
        raise EstimateError(
            f"{fields.where}: num_experts_per_tok is {found.per_token}, but {_EXPERTS} only "
            f"{found.count}"
        )
    return found


def _attention_sizes(fields: ConfigFields) -> tuple[int, int, int]:
    """Heads, KV heads, and the width of one."""
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise EstimateError(
            f"{fields.where}: num_key_value_heads is {kv_heads}; it must divide "
            f"num_attention_heads, which is {heads}"
        )
    if not fields.has("head_dim") and hidden % heads:
        raise EstimateError(
            f"{fields.where}: num_attention_heads is {heads}; it must divide hidden_size, which "
            f"is {hidden}, or head_dim must be there"
        )
    return heads, kv_heads, fields.count("head_dim", hidden // heads or 1)


def _vectors(fields: ConfigFields, qkv_bias: bool = False, qk_norms: bool = False) -> int:
    """Norms and biases of a model that is built as Llama is."""
    heads, kv_heads, head_dim = _attention_sizes(fields)
    hidden, inner = fields.count("hidden_size"), fields.count("intermediate_size")
    of_a_layer = 2 * hidden + (2 * head_dim if qk_norms else 0)
    if fields.flag("attention_bias", False):
        of_a_layer += (heads + 2 * kv_heads) * head_dim + hidden
    elif qkv_bias:
        of_a_layer += (heads + 2 * kv_heads) * head_dim
    if fields.flag("mlp_bias", False):
        of_a_layer += 2 * inner + hidden
    return fields.count(_LAYERS) * of_a_layer + hidden


def _decoder(
    fields: ConfigFields, name: str, vectors: int, experts: Experts | None = None, sparse: int = 0
) -> Decoder:
    """A model that is built as Llama is, `sparse` of its layers with experts."""
    heads, kv_heads, head_dim = _attention_sizes(fields)
    return Decoder(
        name=name,
        model_type=fields.content["model_type"],
        hidden=fields.count("hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=fields.count("intermediate_size"),
        gated=True,
        vocab=fields.count("vocab_size"),
        tied=fields.flag("tie_word_embeddings", False),
        positions=_positions(fields),
        learned_positions=0,
        dense_layers=fields.count(_LAYERS) - sparse,
        expert_layers=sparse,
        experts=experts if sparse else None,
        vectors=vectors,
    )


def _positions(fields: ConfigFields) -> int | None:
    name = "max_position_embeddings"
    return fields.count(name) if fields.has(name) else None


def _opt(fields: ConfigFields, name: str) -> Decoder:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    inner, layers = fields.count("ffn_dim"), fields.count(_LAYERS)
    width = fields.count("word_embed_proj_dim", hidden)
    if width != hidden:
        raise EstimateError(
            f"{fields.where}: word_embed_proj_dim is {width}; only models where it equals "
            f"hidden_size, {hidden}, are known"
        )
    biases = 5 * hidden + inner if fields.flag("enable_bias", True) else 0
    positions = fields.count("max_position_embeddings")
    return _with_learned_positions(
        fields, name, (hidden, heads, inner, layers), layers * (biases + 4 * hidden) + 2 * hidden,
        (positions, positions + _OPT_OFFSET),
    )  # fmt: skip


def _gpt2(fields: ConfigFields, name: str) -> Decoder:
    hidden, heads = fields.count("n_embd"), fields.count("n_head")
    inner, layers = fields.count("n_inner", 4 * hidden), fields.count("n_layer")
    vectors = layers * (9 * hidden + inner) + 2 * hidden
    positions = fields.count("n_positions")
    sizes = (hidden, heads, inner, layers)
    return _with_learned_positions(fields, name, sizes, vectors, (positions, positions))


def _with_learned_positions(
    fields: ConfigFields,
    name: str,
    sizes: tuple[int, int, int, int],
    vectors: int,
    positions: tuple[int, int],
) -> Decoder:
    """As many KV heads as heads, an MLP without a gate, a table of positions."""
    hidden, heads, inner, layers = sizes
    if hidden % heads:
        raise EstimateError(f"{fields.where}: {heads} heads do not divide the width of {hidden}")
    return Decoder(
        name=name,
        model_type=fields.content["model_type"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inner=inner,
        gated=False,
        vocab=fields.count("vocab_size"),
        tied=fields.flag("tie_word_embeddings", True),
        positions=positions[0],
        learned_positions=positions[1],
        dense_layers=layers,
        expert_layers=0,
        experts=None,
        vectors=vectors,
    )


_LAYERS = "num_hidden_layers"
_USUAL = ("hidden_size", "intermediate_size", _LAYERS, "num_attention_heads", "vocab_size")
_EXPERTS = "num_experts or num_local_experts"  # of which transformers writes the one or the other
_SPARSE = (*_USUAL, _EXPERTS, "num_experts_per_tok")
_MOE = (*_SPARSE, "moe_intermediate_size")
FAMILIES: dict[str, Family] = {
    "llama": Family(_USUAL, _llama),
    "mistral": Family(_USUAL, _llama),
    "qwen2": Family(_USUAL, _qwen2),
    "qwen3": Family(_USUAL, _qwen3),
    "mixtral": Family(_SPARSE, _mixtral),
    "olmoe": Family(_SPARSE, _olmoe),
    "qwen2_moe": Family((*_MOE, "shared_expert_intermediate_size"), _qwen2_moe),
    "qwen3_moe": Family(_MOE, _qwen3_moe),
    "opt": Family(
        ("hidden_size", "ffn_dim", _LAYERS, "num_attention_heads", "vocab_size",
         "max_position_embeddings"), _opt,
    ),
    "gpt2": Family(("n_embd", "n_layer", "n_head", "vocab_size", "n_positions"), _gpt2),
}  # fmt: skip
