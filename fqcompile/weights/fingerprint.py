"""Change detection for weights: versions and addresses, and digests of the content.

Versions and addresses are compared on every call. They do not detect a write through `.data`; a
digest of the content does, and is compared when a graph sees a weight for the first time.

The digest is SHA-256 over the digests of pieces of rows, computed in parallel; nobody can construct
a collision. A core with SHA instructions hashes 1.8 GB/s (0.9 GB/s with BLAKE2b) and quantizes 0.04
to 0.12 GB/s of bf16 weights.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import pad
from torch.optim.optimizer import register_optimizer_step_post_hook

from fqcompile.files.safetensors_file import bytes_of
from fqcompile.tensor.chunks import each_chunk
from fqcompile.torch_compat import count_of_writes, is_expired
from fqcompile.weights.memory import NoMemory
from fqcompile.weights.parameter import PackedWeight

Fingerprint = tuple[tuple[int, ...], tuple[int, ...]]

# How often a result is computed again if its weight was written to during the computation.
ATTEMPTS = 3
_PIECE = 1 << 25  # bytes
_FACTORS = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64))
_CHUNK_SHARE = 8.0  # half a million elements each, which take much longer than starting a task


def fingerprint(weights: tuple[Tensor, ...]) -> Fingerprint:
    """Versions and addresses: they change if a weight is updated in place or gets other storage.

    Runs on every call of a compiled graph: 27 us for 224 weights. PyTorch increments a version when
    a write has ended, so values that were read during the write count as stale after it.
    """
    try:
        return tuple(map(count_of_writes, weights)), tuple(map(Tensor.data_ptr, weights))
    except RuntimeError:
        return tuple(map(_version_or_0, weights)), tuple(map(_address_or_0, weights))


def _version_or_0(weight: Tensor) -> int:
    """The version; 0 for tensors made in inference mode, which have none."""
    return 0 if weight.is_inference() else count_of_writes(weight)


def _address_or_0(weight: Tensor) -> int:
    """The address; 0 for sparse tensors, which have several and are never quantized."""
    return weight.data_ptr() if weight.layout is torch.strided else 0


class Memory:
    """Weak references to the storages of weights.

    New memory may have the address of freed memory, as after `p.data = torch.empty(0); p.data =
    new`: the fingerprint is unchanged, but the old storage is gone.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        plain = (w for w in weights if not isinstance(w, NoMemory) and w.layout is torch.strided)
        self._references = [StorageWeakRef(w.untyped_storage()) for w in plain]
        self._places = [reference.cdata for reference in self._references]

    def gone(self) -> bool:
        """Whether the storage of some weight was freed. 8 us for 224 weights."""
        return any(map(is_expired, self._places))


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Increment the versions of parameters that a fused optimizer wrote without doing so."""
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(
                [p for p in group["params"] if not p.is_inference()]
            )


register_optimizer_step_post_hook(_count_fused_steps)


class Values(NamedTuple):
    """Identifies the values of a weight: equal if the values and their memory are the same."""

    fingerprint: Fingerprint
    digest: str


def values_of(weight: Tensor) -> Values:
    """The fingerprint first: a write that ends between the two makes the next one unequal."""
    state = fingerprint((weight,))
    if isinstance(weight, PackedWeight):  # has its codes; nothing is made of its values
        return Values(state, "")
    if weight.device.type == "cpu" and weight.dim() in (2, 3):
        return Values(state, content_digest(weight))
    return Values(state, f"{weight.dtype} {tuple(weight.shape)} {mixed_sum(weight)}")


def content_digest(w: Tensor) -> str:
    """Of w [N, K] or [E, N, K] on a CPU, of any strides: 64 hexadecimal digits.

    A transposed view is read as it lies in memory, six times as fast, so it has a name of its own.
    """
    transposed = w.mT.is_contiguous() and not w.is_contiguous()
    digest = sha256(f"{w.dtype} {tuple(w.shape)} {transposed}".encode())
    stack = w.mT if transposed else w
    for matrix in [stack] if stack.dim() == 2 else stack.unbind():
        for piece in _digests(matrix):
            digest.update(piece)
    return digest.hexdigest()


def mixed_sum(w: Tensor) -> int:
    """A 64-bit hash of the bytes of w (any shape), computed on its device.

    It detects changes of a weight within one process and is not safe against constructed
    collisions. Each 8-byte word is mixed with its position by the finalizer of MurmurHash3, and the
    results are added.
    """
    flat = w.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=w.device)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        words = pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        places = torch.arange(start, start + words.numel(), device=w.device)
        total += _mixed(_mixed(places) ^ words).sum()
    return int(total)


def _mixed(words: Tensor) -> Tensor:
    """MurmurHash3's 64-bit finalizer; the mask makes a right shift of signed words logical."""
    for factor in _FACTORS:
        words = (words ^ ((words >> 33) & 0x7FFFFFFF)) * factor
    return words ^ ((words >> 33) & 0x7FFFFFFF)


def _digests(w: Tensor) -> Iterator[bytes]:
    def digest(rows: slice) -> bytes:
        return sha256(bytes_of(w[rows].contiguous())).digest()

    yield from each_chunk(digest, w, _CHUNK_SHARE)
