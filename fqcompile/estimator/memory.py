"""Bytes on one GPU: weights, KV cache, what a pass needs beside them, and what there is.

Functions of plain numbers take symbols as well: `assumptions` prints them.
"""

from dataclasses import dataclass
from typing import Any

from fqcompile.estimator.decoder import Decoder
from fqcompile.estimator.devices import Device
from fqcompile.estimator.matmuls import PLAIN_BITS, WeightFormat, spec_of
from fqcompile.estimator.sharding import Matrix, Sharing, Workload, kv_heads_of_a_gpu, matrices
from fqcompile.kernels.roofline import weight_bytes

FLOAT_BYTES = 2  # of activations, keys and values
USABLE_SHARE = 0.95  # the rest is for the driver's context, libraries and fragments
_LOGIT_BYTES = 6  # in 16 bits, and in 32 for choosing a token


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; `usable` is what programs have of it, `kv_of_a_sequence` part of `kv`."""

    weights: int
    kv: int
    activations: int
    usable: float
    kv_of_a_sequence: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    @property
    def most_sequences(self) -> int:
        """How many a GPU has room for, at this context."""
        return max(0, int((self.usable - self.weights - self.activations) // self.kv_of_a_sequence))


def kv_bytes(layers: Any, kv_heads: Any, head_dim: Any, tokens: Any) -> Any:
    """Keys and values of all layers."""
    return 2 * layers * kv_heads * head_dim * FLOAT_BYTES * tokens


def weight_memory(decoder: Decoder, sharing: Sharing, form: WeightFormat, device: Device) -> int:
    """Codes, scales, embeddings and vectors. A tied head that is quantised is a copy."""
    held = matrices(decoder, sharing)
    shared = decoder.tied and form.head_bits == PLAIN_BITS
    packed = sum(
        matrix.layers * max(1, matrix.experts) * weight_bytes(spec_of(matrix, 1, form, device))
        for matrix in held
        if not (matrix.is_head and shared)
    )
    return packed + (decoder.embedding_weights + decoder.vectors) * FLOAT_BYTES


def activation_memory(
    decoder: Decoder, sharing: Sharing, form: WeightFormat, load: Workload
) -> int:
    """The most at once: of a prefill's pass the widest part of a layer, or a step's logits; and
    where weights are quantised, one of them in 16 bits: many rows are multiplied so."""
    held = matrices(decoder, sharing)
    rows = load.pass_tokens(sharing)
    widths = {m.name: (m.n * (2 if m.gated else 1), m.k) for m in held if not m.is_head}
    attention = sum(widths["qkv"]) + sum(widths["o"])
    mlp = _widest_mlp(decoder, sharing, held)
    layer = rows * (decoder.hidden + max(attention, mlp)) * FLOAT_BYTES
    logits = load.step_rows(sharing) * decoder.vocab * _LOGIT_BYTES
    scratch = 0
    if form.bits != PLAIN_BITS:
        scratch = max(m.weights // m.layers for m in held if not m.is_head) * FLOAT_BYTES
    return max(layer, logits) + scratch


def _widest_mlp(decoder: Decoder, sharing: Sharing, held: list[Matrix]) -> int:
    """Elements for each token between a layer's norm and its sum: in, up (and gate), act, out."""
    widest = 0
    for matrix in held:
        if matrix.name.endswith("down"):
            up = (3 if decoder.gated else 2) * matrix.k
            routed = 1.0
            if matrix.experts and decoder.experts is not None:
                # Rows of all groups are routed, 1/ep of them here.
                share = sharing.attention_groups / sharing.ep
                routed = decoder.experts.per_token * share
            widest = max(widest, int(routed * (2 * decoder.hidden + up)))
    return widest


def memory_of(
    decoder: Decoder, sharing: Sharing, form: WeightFormat, load: Workload, device: Device
) -> Memory:
    """Everything that one GPU has to hold."""
    kv_heads = kv_heads_of_a_gpu(decoder, sharing)
    sequence = int(kv_bytes(decoder.layers, kv_heads, decoder.head_dim, load.context))
    return Memory(
        weights=weight_memory(decoder, sharing, form, device),
        kv=sequence * load.step_rows(sharing),
        activations=activation_memory(decoder, sharing, form, load),
        usable=USABLE_SHARE * device.memory,
        kv_of_a_sequence=sequence,
    )
