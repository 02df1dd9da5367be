"""content_digest: a name that no two tensors of different type, shape or values have.

SHA-256 of pieces of rows, several at a time, and then of their digests, so that two contents of one
name are not to be found. A core that has instructions for it digests 1.8 GB/s (BLAKE2b .9), and
quantises .04 to .12 GB/s of bf16 weights.
"""

from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor

from fqcompile.quant.chunks import each_chunk

_CHUNK_SHARE = 8.0  # pieces of half a million elements: long beside the start of a task


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


def bytes_of(w: Tensor) -> memoryview:
    """The memory of a contiguous tensor on a CPU, which lives as long as this does."""
    flat = w.detach().as_strided((w.numel(),), (1,))  # a view of one value may have any stride
    return flat.view(torch.uint8).numpy().data


def _digests(w: Tensor) -> Iterator[bytes]:
    def digest(rows: slice) -> bytes:
        return sha256(bytes_of(w[rows].contiguous())).digest()

    yield from each_chunk(digest, w, _CHUNK_SHARE)
