"""Decoder: the shape of a language model, all that memory and speed follow from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        count: how many there are.
        per_token: how many each token is sent to.
        inner: width between up and down of one.
        shared_inner: of the expert that every token passes; 0 where there is none.
        shared_gate: whether a vector [1, hidden] weighs that one.
    """

    count: int
    per_token: int
    inner: int
    shared_inner: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class Decoder:
    """A decoder of equal layers, but that some may have experts where others have one MLP.

    Attributes:
        heads: of queries; `kv_heads` those of keys and values.
        inner: width of the MLP of a layer without experts.
        gated: gate and up instead of up alone.
        tied: the head is the embedding.
        positions: the longest sequence; None where the config does not say.
        learned_positions: rows of a table of positions; 0 where they are computed.
        dense_layers: how many have an MLP; `expert_layers` how many have `experts`.
        vectors: parameters that are no matrices: norms and biases, of the whole model.
    """

    name: str
    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    gated: bool
    vocab: int
    tied: bool
    positions: int | None
    learned_positions: int
    dense_layers: int
    expert_layers: int
    experts: Experts | None
    vectors: int

    @property
    def layers(self) -> int:
        return self.dense_layers + self.expert_layers

    @property
    def embedding_weights(self) -> int:
        """Of the tables that are looked up in, not multiplied by."""
        return (self.vocab + self.learned_positions) * self.hidden

    @property
    def parameters(self) -> int:
        """Each once: of a tied head none."""
        return self._parameters(self.experts.count if self.experts else 0)

    @property
    def active_parameters(self) -> int:
        """Those that a token meets: of the experts its own."""
        return self._parameters(self.experts.per_token if self.experts else 0)

    def _parameters(self, experts: int) -> int:
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        mlp = (3 if self.gated else 2) * self.hidden
        total = self.layers * attention + self.dense_layers * mlp * self.inner + self.vectors
        total += self.embedding_weights + (0 if self.tied else self.vocab * self.hidden)
        if self.experts is not None:
            routed = experts * self.experts.inner + self.experts.shared_inner
            router = self.experts.count + int(self.experts.shared_gate)
            total += self.expert_layers * (mlp * routed + router * self.hidden)
        return total
