"""Small and made-up models and devices for the estimator's tests."""

from typing import Any

from fqcompile.estimator.decoder import ConfigFields, Decoder
from fqcompile.estimator.devices import Device, Link
from fqcompile.estimator.model_shapes import decoder_of

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
    "max_position_embeddings": 4096,
}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
# Round figures, so that the sums can be done by hand; no GPU: every matmul takes the roofline.
PLAIN = Device("plain", 1e9, 1e9, 1e10, Link("wire", 1e8, 1e-6), "made up", None, 1e-5, 1e-3)


def decoder(config: dict[str, Any] = LLAMA, **changes: Any) -> Decoder:
    return decoder_of(ConfigFields({**config, **changes}, "config.json"), "made-up")
