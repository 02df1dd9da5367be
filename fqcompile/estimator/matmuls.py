"""How a model is sharded over GPUs, and the resulting matmuls, as kernels see them.

A replica has max(tp, ep) GPUs. Attention, dense MLPs and the head are divided by tp: q, k, v, gate
and up by columns, the output projection and down by rows (of a head that does not divide, the
largest part counts). Experts are dealt out to ep groups of GPUs; a group of several divides each of
its experts. Where ep is larger than tp, ep / tp groups of GPUs each attend to a part of the batch.
A GPU holds a copy of a KV head where tp exceeds their number, as vLLM does; and the whole
embedding, as transformers' plans leave it. `Workload` is what a replica is asked to serve,
`WeightFormat` in how many bits weights are.
"""

from dataclasses import dataclass
from functools import cache

import torch

from fqcompile.errors import EstimateError
from fqcompile.estimator.decoder import Decoder, Experts
from fqcompile.estimator.devices import Device
from fqcompile.kernels.epilogue import HAS_TRITON
from fqcompile.kernels.roofline import M, dense, ideal
from fqcompile.kernels.spec import DENSE, GemmSpec

if HAS_TRITON:
    from fqcompile.kernels.triton.configs import candidates
    from fqcompile.kernels.triton.cost import cost

PLAIN_BITS = 16
_LEAST_GROUP = 32
_DTYPE = torch.bfloat16  # of activations and scales


@dataclass(frozen=True)
class Sharing:
    """Degrees of tensor and of expert parallelism; one divides the other."""

    tp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        """Of one replica."""
        return max(self.tp, self.ep)

    @property
    def attention_groups(self) -> int:
        """How many parts of the batch are attended to apart."""
        return self.gpus // self.tp

    @property
    def expert_shards(self) -> int:
        """Into how many parts each expert is divided."""
        return self.gpus // self.ep


@dataclass(frozen=True)
class Matrix:
    """What one GPU holds of a weight: [n, k], of gate and up both; `experts` of them, 0 for one.

    Attributes:
        layers: in how many layers.
        kept: in 16 bits whatever the format.
        is_head: of the whole model, not of a layer.
    """

    name: str
    layers: int
    n: int
    k: int
    gated: bool = False
    experts: int = 0
    kept: bool = False
    is_head: bool = False

    @property
    def weights(self) -> int:
        """In all layers."""
        stack = max(1, self.experts)
        return self.layers * stack * self.n * self.k * (2 if self.gated else 1)


def check(decoder: Decoder, sharing: Sharing) -> None:
    """Raise where the model does not divide so.

    Raises:
        EstimateError: what does not divide, and by what.
    """
    tp, ep = sharing.tp, sharing.ep
    if min(tp, ep) < 1:
        raise EstimateError(f"tp {tp}, ep {ep}: both are at least 1")
    if max(tp, ep) % min(tp, ep):
        raise EstimateError(f"tp {tp} and ep {ep}: one must divide the other")
    if ep > 1 and decoder.experts is None:
        raise EstimateError(f"ep {ep}: {decoder.name} has no experts; use tp")
    if decoder.kv_heads % tp and tp % decoder.kv_heads:
        raise EstimateError(
            f"tp {tp} neither divides nor is divided by {decoder.kv_heads} KV heads"
        )
    wrong = [f"{size} {what}" for what, size in _divided_by_tp(decoder) if size % tp]
    if wrong:
        raise EstimateError(f"tp {tp} does not divide {', '.join(wrong)}")
    if decoder.experts is not None:
        _check_experts(decoder.experts, sharing)


def _divided_by_tp(decoder: Decoder) -> list[tuple[str, int]]:
    sizes = [("heads", decoder.heads)]
    if decoder.dense_layers:
        sizes.append(("columns of the MLP", decoder.inner))
    if decoder.experts is not None and decoder.experts.shared_inner:
        sizes.append(("columns of the shared expert", decoder.experts.shared_inner))
    return sizes


def _check_experts(experts: Experts, sharing: Sharing) -> None:
    if experts.count % sharing.ep:
        raise EstimateError(f"ep {sharing.ep} does not divide {experts.count} experts")
    if experts.inner % sharing.expert_shards:
        raise EstimateError(
            f"tp {sharing.tp}, ep {sharing.ep}: {sharing.expert_shards} shards do not divide "
            f"{experts.inner} columns of an expert"
        )


def kv_heads_of_a_gpu(decoder: Decoder, sharing: Sharing) -> int:
    """KV heads on each GPU, at least one."""
    return max(1, decoder.kv_heads // sharing.tp)


def matrices(decoder: Decoder, sharing: Sharing) -> list[Matrix]:
    """What one GPU holds; the model must have passed `check`."""
    tp, hidden, layers = sharing.tp, decoder.hidden, decoder.layers
    q = decoder.heads // tp * decoder.head_dim
    kv = kv_heads_of_a_gpu(decoder, sharing) * decoder.head_dim
    found = [Matrix("qkv", layers, q + 2 * kv, hidden), Matrix("o", layers, hidden, q)]
    if decoder.dense_layers:
        found += _mlp("", decoder, decoder.dense_layers, decoder.inner // tp)
    experts = decoder.experts
    if experts is not None:
        inner, mine = experts.inner // sharing.expert_shards, experts.count // sharing.ep
        found += _mlp("experts ", decoder, decoder.expert_layers, inner, mine)
        router = experts.count + int(experts.shared_gate)
        found.append(Matrix("router", decoder.expert_layers, router, hidden, kept=True))
        if experts.shared_inner:
            shared = experts.shared_inner // tp
            found += _mlp("shared expert ", decoder, decoder.expert_layers, shared)
    return [*found, Matrix("head", 1, -(-decoder.vocab // tp), hidden, is_head=True)]


def _mlp(what: str, decoder: Decoder, layers: int, inner: int, experts: int = 0) -> list[Matrix]:
    up = "gate_up" if decoder.gated else "up"
    return [
        Matrix(f"{what}{up}", layers, inner, decoder.hidden, decoder.gated, experts),
        Matrix(f"{what}down", layers, decoder.hidden, inner, experts=experts),
    ]


@dataclass(frozen=True)
class Workload:
    """`batch` sequences of one replica, each of `context` tokens: so long a prompt is read, and so
    many tokens a step of decoding attends to. A prefill's pass reads at most `chunk` tokens."""

    batch: int
    context: int
    chunk: int = 8192

    def step_rows(self, sharing: Sharing) -> int:
        """Sequences that a GPU attends to; of unequal parts the largest."""
        return -(-self.batch // sharing.attention_groups)

    def pass_tokens(self, sharing: Sharing) -> int:
        """Tokens of a prefill's pass that a GPU attends to."""
        return min(self.chunk, self.step_rows(sharing) * self.context)

    def check(self, decoder: Decoder) -> None:
        """Raise where the model has no positions for so many tokens."""
        if min(self.batch, self.context, self.chunk) < 1:
            raise EstimateError(
                f"batch {self.batch}, context {self.context}, chunk {self.chunk}: all at least 1"
            )
        if decoder.positions is not None and self.context > decoder.positions:
            raise EstimateError(
                f"context {self.context}: {decoder.name} has positions for {decoder.positions} "
                "tokens (max_position_embeddings or n_positions)"
            )


@dataclass(frozen=True)
class WeightFormat:
    """Bits and scales: bf16 scales, one for `group` weights along K, or None: for each column.

    Attributes:
        head_bits: of the output head. Embeddings, routers, norms and biases keep 16 bits.
    """

    name: str
    bits: int
    group: int | None
    head_bits: int

    def bits_of(self, matrix: Matrix) -> int:
        """Of that matrix's weights."""
        if matrix.kept:
            return PLAIN_BITS
        return self.head_bits if matrix.is_head else self.bits

    def group_of(self, matrix: Matrix) -> int:
        """The group along K: of 8 bits the column, else halved until it divides K, if it can be."""
        if self.group is None or self.bits_of(matrix) != self.bits:
            return matrix.k
        group = min(self.group, matrix.k)
        while matrix.k % group and group % 2 == 0 and group > _LEAST_GROUP:
            group //= 2
        return group


def formats(group: int | None, head_bits: int) -> dict[str, WeightFormat]:
    """The formats that plans compare; `group` is that of int4."""
    return {
        "bf16": WeightFormat("bf16", PLAIN_BITS, None, PLAIN_BITS),
        "int8": WeightFormat("int8", 8, None, 8),
        "int4": WeightFormat("int4", 4, group, head_bits),
    }


def spec_of(matrix: Matrix, rows: int, form: WeightFormat, device: Device) -> GemmSpec:
    """The matmul with so many rows of x; of experts, routed ones on this GPU."""
    return GemmSpec(
        rows,
        matrix.n,
        matrix.k,
        form.bits_of(matrix),
        form.group_of(matrix),
        _DTYPE,
        _DTYPE,
        "cpu" if device.gpu is None else "cuda",
        gated=matrix.gated,
        gpu=device.gpu,
        experts=matrix.experts,
        routing="grouped" if matrix.experts else None,
        levels="normal" if form.bits_of(matrix) == 4 else "uniform",
    )


@cache
def matmul_seconds(spec: GemmSpec, device: Device, hit: float | None = None) -> float:
    """Of spec.m rows; `hit`: how many experts they read.

    A quantized weight on a GPU takes what the cost model says of the configuration that it ranks
    first, which is what `select` chooses. Weights of 16 bits, a CPU, and a machine without Triton:
    the roofline, and a launch.
    """
    if spec.gpu is None or spec.bits == PLAIN_BITS or not HAS_TRITON:
        return float(ideal(spec, device, hit).subs(M, spec.m)) + device.launch_seconds
    config = candidates(spec, spec.m, "fast")[0]
    if config is DENSE:
        return float(dense(spec, spec.gpu).subs(M, spec.m))
    return cost(spec, config, spec.gpu, spec.m, hit).seconds
