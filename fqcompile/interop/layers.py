"""The layers of a checkpoint in the format `pack-quantized`: their schemes, names and tensors.

M.weight_packed int32 [N, K·b/32], M.weight_scale [N, groups], M.weight_shape int64 [2] = [N, K]
M.weight [N, K]                                                          where M is not quantised

Names tell which layers an engine fuses, which are experts, which are split:

q_proj, k_proj, v_proj -> qkv_proj           experts.0.gate_proj, experts.1... -> experts
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fqcompile.config import HEADS, ROUTERS
from fqcompile.errors import CheckpointError

# Code widths and group sizes that every engine has a kernel for; None: one scale per channel.
BITS = (4, 8)
GROUP_SIZES = (128, 64, 32)
WORD_BITS = 32


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
    """What an engine calls the layer that this one is a part of; the name itself if of none.

    Args:
        present: names of all layers (a set); a part without its partner is not fused.
    """
    parent, _, own = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for fused, parts in FUSED:
        if own in parts and sum(prefix + part in present for part in parts) > 1:
            return prefix + fused
    return name


def is_head(name: str) -> bool:
    return last(name) in HEADS


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


PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class TensorInfo(Protocol):
    """A safetensors entry."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Layer:
    """A linear layer, or one projection of one expert. `scheme` is None where it is dense."""

    name: str
    n: int
    k: int
    scheme: Scheme | None = None


def find_layers(
    tensors: Mapping[str, TensorInfo],
    shape_of: Callable[[str], tuple[int, int]],
    where: Callable[[str], str],
) -> list[Layer]:
    """All layers that multiply: packed ones, and dense matrices that are no embeddings.

    Args:
        shape_of: the content of a `weight_shape`.
        where: the file of a tensor, for errors.

    Raises:
        CheckpointError: tensors of a packed layer are missing or do not fit; file and tensor are
            named.
    """
    found = []
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            found.append(_packed_layer(module, tensors, shape_of, where))
        elif part == "weight" and len(info.shape) == 2 and not is_embedding(module):
            found.append(Layer(module, *info.shape))
        elif part in PARTS and f"{module}.weight_packed" not in tensors:
            raise CheckpointError(f"{where(name)}: {name} is there, {module}.weight_packed is not")
    return found


def _packed_layer(
    module: str,
    tensors: Mapping[str, TensorInfo],
    shape_of: Callable[[str], tuple[int, int]],
    where: Callable[[str], str],
) -> Layer:
    packed, scale, shape, zero = (f"{module}.{part}" for part in PARTS)
    for name in (scale, shape):
        if name not in tensors:
            raise CheckpointError(f"{where(packed)}: {packed} is there, {name} is not")
    _check(tensors, packed, ("I32",), 2, where)
    _check(tensors, scale, ("F16", "BF16", "F32"), 2, where)
    _check(tensors, shape, ("I64", "I32"), 1, where)
    if tensors[shape].shape != (2,):
        raise CheckpointError(f"{where(shape)}: {shape} has {tensors[shape].shape}, not (2,)")
    n, k = shape_of(shape)
    rows, words = tensors[packed].shape
    bits = next((b for b in range(1, 9) if -(-k * b // WORD_BITS) == words), None)
    if k % WORD_BITS:  # a few bits more or less would fill as many words
        bits = next((b for b in BITS if -(-k * b // WORD_BITS) == words), bits)
    scales, groups = tensors[scale].shape
    size = None if groups == 1 else -(-k // groups)
    scheme = Scheme(bits or 0, size, zero not in tensors)
    if min(n, k) < 1 or rows != n or scales != n or not bits or scheme.groups(k) != groups:
        raise CheckpointError(
            f"{where(packed)}: {packed} {[rows, words]} and {scale} {[scales, groups]} are no "
            f"codes and scales of {shape}, which says {[n, k]}"
        )
    return Layer(module, n, k, scheme)


def _check(
    tensors: Mapping[str, TensorInfo],
    name: str,
    dtypes: Iterable[str],
    dims: int,
    where: Callable[[str], str],
) -> None:
    info = tensors[name]
    if info.dtype not in dtypes or len(info.shape) != dims:
        raise CheckpointError(
            f"{where(name)}: {name} is {info.dtype} {list(info.shape)}; it must be "
            f"{' or '.join(dtypes)} of {dims} dimensions"
        )
