"""content_digest: a name that no two tensors of different type, shape or values have.

SHA-256 of pieces of rows, several at a time, and then of their digests, so that two contents of one
name are not to be found. A core that has instructions for it digests 1.8 GB/s (BLAKE2b .9), and
quantises .04 to .12 GB/s of bf16 weights.
"""

from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn.functional import pad

from fqcompile.files.safetensors_file import bytes_of
from fqcompile.tensor.chunks import each_chunk

_PIECE = 1 << 25  # bytes
_FACTORS = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64))
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


def mixed_sum(w: Tensor) -> int:
    """64 bits of the bytes of w, of any shape, made on its device: another content has others.

    To compare what one process has seen of one weight: nobody need be kept from finding two
    contents of one sum. Each word is mixed with its place, as MurmurHash3 ends, and all are added.
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
    """A permutation of the numbers of 64 bits; a shift to the right must not copy the sign."""
    for factor in _FACTORS:
        words = (words ^ ((words >> 33) & 0x7FFFFFFF)) * factor
    return words ^ ((words >> 33) & 0x7FFFFFFF)


def _digests(w: Tensor) -> Iterator[bytes]:
    def digest(rows: slice) -> bytes:
        return sha256(bytes_of(w[rows].contiguous())).digest()

    yield from each_chunk(digest, w, _CHUNK_SHARE)
