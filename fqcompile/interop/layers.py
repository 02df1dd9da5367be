"""The layers of a checkpoint: their schemes, and the properties that engines derive from names.

Names determine which layers an engine fuses, which are experts and which are split:

q_proj, k_proj, v_proj -> qkv_proj           experts.0.gate_proj, experts.1... -> experts
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fqcompile.config import HEADS, ROUTERS

# Code widths and group sizes that every engine has a kernel for; None: one scale per channel.
BITS = (4, 8)
GROUP_SIZES = (128, 64, 32)
WORD_BITS = 32
# Serving engines fill the rows of a head up to multiples of this, before they split them.
_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class Scheme:
    """`group_size` is None for one scale per output channel."""

    bits: int
    group_size: int | None
    symmetric: bool = True

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {group}{'' if self.symmetric else ' asymmetric'}"

    @property
    def codes_per_word(self) -> int:
        return WORD_BITS // self.bits

    def groups(self, k: int) -> int:
        """Scales in a row of K weights."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    def is_shaped_as(self, other: "Scheme | None", k: int) -> bool:
        """Whether codes and scales for K weights have the other's shapes; None: dense."""
        return other is not None and (self.bits, self.groups(k)) == (other.bits, other.groups(k))


@dataclass(frozen=True)
class Layer:
    """A linear layer, or one projection of one expert. `scheme` is None where it is dense."""

    name: str
    n: int
    k: int
    scheme: Scheme | None = None


# A fused layer's name, and those of its parts in a checkpoint.
FUSED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
EXPERT = re.compile(r"(?P<stack>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<projection>[^.]+)")
_IN_ROUTER = re.compile(r"(?:.+\.)?router\.(?:layer|proj)")
_EMBEDDING = re.compile(
    r"(?:.+\.)?(?:[^.]*embed[^.]*|wte|wpe|shared|relative_attention_bias)(?:\.\d+)?"
)
# Tensor parallelism splits these along K, and most others along N.
_ALONG_K = frozenset("o_proj out_proj down_proj w2 fc2 wo dense_4h_to_h c_proj".split())
_DENSE_ALONG_K = re.compile(r".*(?:output|attention|attn)\.dense")
_WHOLE = frozenset("q_a_proj kv_a_proj_with_mqa".split())
_HEADS = frozenset("k_proj v_proj key value".split())  # repeated where there are too few


def last(name: str) -> str:
    return name.rpartition(".")[2]


def stack_of(name: str) -> str | None:
    """The stack of experts that a layer is in: "layers.0.mlp.experts", or None."""
    found = EXPERT.fullmatch(name)
    return found["stack"] if found else None


def fused_name(name: str, present: Iterable[str]) -> str:
    """The engine's name of the fused layer that contains this one; its own name if not fused.

    Args:
        present: names of all layers (a set); a part without its partner is not fused.
    """
    parent, _, own = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for fused, parts in FUSED:
        if own in parts and sum(prefix + part in present for part in parts) > 1:
            return prefix + fused
    return name


def part_order(layer: Layer) -> int:
    """The place of a part in its fused layer; files have other orders."""
    own = last(layer.name)
    return next((parts.index(own) for _, parts in FUSED if own in parts), 0)


def is_head(name: str) -> bool:
    return last(name) in HEADS


def served_rows(name: str, n: int) -> int:
    """The N rows of a layer as serving engines hold them."""
    return -(-n // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE if is_head(name) else n


def is_router(name: str) -> bool:
    return last(name) in ROUTERS or _IN_ROUTER.fullmatch(name) is not None


def is_embedding(name: str) -> bool:
    return _EMBEDDING.fullmatch(name) is not None and not is_head(name)


def is_split_along_k(name: str) -> bool:
    return last(name) in _ALONG_K or _DENSE_ALONG_K.fullmatch(name) is not None


def is_split_along_n(name: str) -> bool:
    """Evenly, that is: heads of keys and values may be repeated, and routers are whole."""
    own = last(name)
    whole = own in _WHOLE or own in _HEADS or is_router(name)
    return not whole and not is_split_along_k(name)
