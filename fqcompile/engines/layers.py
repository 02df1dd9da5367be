"""The layers of a checkpoint in the format `pack-quantized`, told from its tensors' shapes.

M.weight_packed int32 [N, K·b/32], M.weight_scale [N, groups], M.weight_shape int64 [2] = [N, K]
M.weight [N, K]                                                          where M is not quantised
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fqcompile.engines.module_names import is_embedding
from fqcompile.engines.scheme import BITS, WORD_BITS, Scheme
from fqcompile.errors import CheckpointError

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
