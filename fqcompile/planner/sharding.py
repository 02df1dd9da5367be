"""How a model is shared out over GPUs: what each of them holds of every matrix.

A replica has max(tp, ep) GPUs. Attention, dense MLPs and the head are divided by tp: q, k, v, gate
and up by columns, the output projection and down by rows (of a head that does not divide, the
largest part counts). Experts are dealt out to ep groups of
GPUs; a group of several divides each of its experts. Where ep is larger than tp, ep / tp groups of
GPUs each attend to a part of the batch. A GPU holds a copy of a KV head where tp exceeds their
number, as vLLM does; and the whole embedding, as transformers' plans leave it.
"""

from dataclasses import dataclass

from fqcompile.errors import PlannerError
from fqcompile.planner.decoder import Decoder, Experts


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
        PlannerError: what does not divide, and by what.
    """
    tp, ep = sharing.tp, sharing.ep
    if min(tp, ep) < 1:
        raise PlannerError(f"tp {tp}, ep {ep}: both are at least 1")
    if max(tp, ep) % min(tp, ep):
        raise PlannerError(f"tp {tp} and ep {ep}: one must divide the other")
    if ep > 1 and decoder.experts is None:
        raise PlannerError(f"ep {ep}: {decoder.name} has no experts; use tp")
    if decoder.kv_heads % tp and tp % decoder.kv_heads:
        raise PlannerError(f"tp {tp} neither divides nor is divided by {decoder.kv_heads} KV heads")
    wrong = [f"{size} {what}" for what, size in _divided_by_tp(decoder) if size % tp]
    if wrong:
        raise PlannerError(f"tp {tp} does not divide {', '.join(wrong)}")
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
        raise PlannerError(f"ep {sharing.ep} does not divide {experts.count} experts")
    if experts.inner % sharing.expert_shards:
        raise PlannerError(
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
