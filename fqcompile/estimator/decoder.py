"""Decoder: the shape of a language model, which determines memory and speed.

It is read from an untrusted config.json: each key is checked for presence and range.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqcompile.errors import EstimateError

_MOST = 10**9  # more than any side of a model: a slip of the pen


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


@dataclass(frozen=True)
class ConfigFields:
    """The content of a config.json, and where it is from.

    Where versions of transformers spell a key differently, a name is both, with " or " between.
    """

    content: Mapping[str, Any]
    where: str

    def require(self, *names: str) -> None:
        """Raise, with all of them, where keys are missing."""
        missing = [name for name in names if self._value(name) is None]
        if missing:
            kind = self.content.get("model_type")
            raise EstimateError(
                f"{self.where} lacks {', '.join(missing)}, which a model of type {kind!r} has"
            )

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` up; `default` where the key is absent or null."""
        value = self._value(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= _MOST:
            raise EstimateError(
                f"{self.where}: {name} is {value!r}; it must be a whole number from {least} to "
                f"{_MOST}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise EstimateError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return value

    def has(self, name: str) -> bool:
        """Whether the key is there, and not null."""
        return self._value(name) is not None

    def _value(self, name: str) -> Any:
        found = (self.content.get(spelling) for spelling in name.split(" or "))
        return next((value for value in found if value is not None), None)

    def layer_numbers(self, name: str) -> list[int]:
        """A list of numbers of layers, empty where there is none."""
        value = self._value(name) or []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise EstimateError(f"{self.where}: {name} is {value!r}; it must list layer numbers")
        return value


def read_fields(path: Path) -> ConfigFields:
    """The keys of a config.json.

    Raises:
        EstimateError: it cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EstimateError(f"{path} cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise EstimateError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise EstimateError(f"{path} holds a {type(content).__name__}, not the keys of a model")
    return ConfigFields(content, str(path))
