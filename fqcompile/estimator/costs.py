"""Bytes on one GPU, and seconds of a decoding step and of a prefill pass, part by part.

Assumptions are constants here and in `devices`; nothing is fitted to a measurement.
Functions of plain numbers take symbols as well: `assumptions` prints them.
"""

from dataclasses import dataclass
from typing import Any

from fqcompile.estimator.decoder import Decoder
from fqcompile.estimator.devices import (
    Cluster,
    Device,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
)
from fqcompile.estimator.matmuls import (
    PLAIN_BITS,
    Matrix,
    Sharing,
    WeightFormat,
    Workload,
    kv_heads_of_a_gpu,
    matmul_seconds,
    matrices,
    spec_of,
)
from fqcompile.kernels.roofline import weight_bytes

FLOAT_BYTES = 2  # of activations, keys and values
USABLE_SHARE = 0.95  # the rest is for the driver's context, libraries and fragments
_LOGIT_BYTES = 6  # in 16 bits, and in 32 for choosing a token
# Of a layer, beside its matmuls: attention; two norms with their sums, rotations, the cache's new
# rows. Where it has experts: choosing, sorting, counting, the weighted sum.
OTHER_KERNELS, EXPERT_KERNELS = 5, 4
OTHER_PASSES = 8  # over the hidden state of a layer, each a read or a write
ATTENTION_SHARE = 0.6  # of the matrix products' rate that attention over a prompt reaches


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
    """Codes, scales, embeddings and vectors. A tied head that is quantized is a copy."""
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
    where weights are quantized, one of them in 16 bits: many rows are multiplied so."""
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
    """The memory that one GPU needs."""
    kv_heads = kv_heads_of_a_gpu(decoder, sharing)
    sequence = int(kv_bytes(decoder.layers, kv_heads, decoder.head_dim, load.context))
    return Memory(
        weights=weight_memory(decoder, sharing, form, device),
        kv=sequence * load.step_rows(sharing),
        activations=activation_memory(decoder, sharing, form, load),
        usable=USABLE_SHARE * device.memory,
        kv_of_a_sequence=sequence,
    )


@dataclass(frozen=True)
class Speed:
    """Seconds of one pass through the model, and how many tokens it serves on one replica."""

    tokens: int
    matmuls: float
    attention: float
    others: float
    communication: float

    @property
    def seconds(self) -> float:
        return self.matmuls + self.attention + self.others + self.communication

    @property
    def tokens_per_second(self) -> float:
        """Of one replica."""
        return self.tokens / self.seconds

    @property
    def communication_share(self) -> float:
        return self.communication / self.seconds


@dataclass(frozen=True)
class Rows:
    """One pass, on one GPU.

    Attributes:
        tokens: rows of x in the layers.
        outputs: rows that reach the head.
        keys: how many keys and values each query meets in the mean.
        cached: keys and values that are read from memory, of all sequences.
    """

    tokens: int
    outputs: int
    keys: float
    cached: int


def experts_read(experts: Any, per_token: Any, tokens: Any) -> Any:
    """How many experts `tokens` tokens are expected to meet, if all are chosen alike often."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


def attention_flops(tokens: Any, keys: Any, heads: Any, head_dim: Any) -> Any:
    """Scores and their sums of values, of one layer."""
    return 4 * tokens * keys * heads * head_dim


def decode_speed(
    decoder: Decoder, sharing: Sharing, form: WeightFormat, load: Workload, where: Device,
    cluster: Cluster,
) -> Speed:  # fmt: skip
    """A token more for each sequence of the batch."""
    mine = load.step_rows(sharing)
    rows = Rows(mine, mine, load.context, mine * load.context)
    return _pass(decoder, sharing, form, rows, where, cluster, load.batch)


def prefill_speed(
    decoder: Decoder, sharing: Sharing, form: WeightFormat, load: Workload, where: Device,
    cluster: Cluster,
) -> Speed:  # fmt: skip
    """Prompts of `context` tokens, as many as a pass reads; only the last token has logits.

    A query meets the keys before it: half of the context, in the mean.
    """
    mine = load.pass_tokens(sharing)
    outputs = -(-mine // load.context)
    rows = Rows(mine, outputs, load.context / 2, mine)
    tokens = min(mine * sharing.attention_groups, load.batch * load.context)
    return _pass(decoder, sharing, form, rows, where, cluster, tokens)


def _pass(
    decoder: Decoder, sharing: Sharing, form: WeightFormat, rows: Rows, where: Device,
    cluster: Cluster, tokens: int,
) -> Speed:  # fmt: skip
    return Speed(
        tokens=tokens,
        matmuls=sum(
            matrix.layers * seconds
            for matrix, seconds in matmul_parts(decoder, sharing, form, rows, where)
        ),
        attention=decoder.layers * _attention(decoder, sharing, rows, where),
        others=_others(decoder, rows, where),
        communication=_communication(decoder, sharing, rows, where, cluster),
    )


def matmul_parts(
    decoder: Decoder, sharing: Sharing, form: WeightFormat, rows: Rows, where: Device
) -> list[tuple[Matrix, float]]:
    """Each matrix that a GPU holds, and the seconds of one matmul by it."""
    everywhere = rows.tokens * sharing.attention_groups
    found = []
    for matrix in matrices(decoder, sharing):
        count, hit = rows.outputs if matrix.is_head else rows.tokens, None
        if matrix.experts:
            assert decoder.experts is not None, "a stack of experts is of a model that has some"
            per_token, ep = decoder.experts.per_token, sharing.ep
            count = max(1, round(everywhere * per_token / ep))
            hit = experts_read(decoder.experts.count, per_token, everywhere) / ep
        found.append((matrix, matmul_seconds(spec_of(matrix, count, form, where), where, hit)))
    return found


def _attention(decoder: Decoder, sharing: Sharing, rows: Rows, where: Device) -> float:
    """Seconds of attention in one layer: the longer of reading the cache and computing."""
    kv_heads = kv_heads_of_a_gpu(decoder, sharing)
    read: float = kv_bytes(1, kv_heads, decoder.head_dim, rows.cached) / where.bandwidth
    heads = decoder.heads // sharing.tp
    work = attention_flops(rows.tokens, rows.keys, heads, decoder.head_dim)
    computed: float = work / (ATTENTION_SHARE * where.matrix_flops)
    return max(read, computed)


def _others(decoder: Decoder, rows: Rows, where: Device) -> float:
    """Norms, sums, routing; starting kernels; starting the pass."""
    moved = OTHER_PASSES * rows.tokens * decoder.hidden * FLOAT_BYTES / where.bandwidth
    kernels = decoder.layers * OTHER_KERNELS + decoder.expert_layers * EXPERT_KERNELS
    return decoder.layers * moved + kernels * where.launch_seconds + where.step_seconds


def _communication(
    decoder: Decoder, sharing: Sharing, rows: Rows, where: Device, cluster: Cluster
) -> float:
    """Two all-reduces of the hidden state in each layer, over tp GPUs; tokens to their experts and
    back, where they are on GPUs that do not have them already; the logits gathered."""
    state = rows.tokens * decoder.hidden * FLOAT_BYTES
    total = 2 * decoder.layers * all_reduce_seconds(state, sharing.tp, where, cluster)
    logits = rows.outputs * decoder.vocab * FLOAT_BYTES
    total += all_gather_seconds(logits, sharing.tp, where, cluster)
    if sharing.attention_groups > 1 and decoder.experts is not None:
        sent = state / sharing.tp * decoder.experts.per_token
        once = all_to_all_seconds(sent, sharing.ep, where, cluster)
        total += 2 * decoder.expert_layers * once
    return total
